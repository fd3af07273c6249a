"""Fetches the VTAB-1K archive from its mirrors, resuming where an earlier run stopped."""

from __future__ import annotations

import hashlib
import html.parser
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.progress import ProgressCallback, ProgressMeter

ARCHIVE_NAME = "vtab-1k.zip"
HUB_DATASET = "XiN0919/VTAB-1k"
DRIVE_FILE = "1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p"
HUB_PAGE = f"https://huggingface.co/datasets/{HUB_DATASET}/resolve/main/{ARCHIVE_NAME}"
DRIVE_PAGE = f"https://drive.google.com/file/d/{DRIVE_FILE}"

_DRIVE_URL = "https://drive.usercontent.google.com/download"
_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 60
_TRIES_WITHOUT_PROGRESS = 3

OpenUrl = Callable[[urllib.request.Request], Any]


class DownloadError(Exception):
    """One mirror did not deliver; the text says why."""


def fetch_archive(folder: Path, progress: ProgressCallback | None = None) -> Path:
    """Downloads the archive (4.66 GB) into `folder` from the first mirror that delivers; returns its path.

    An archive that is complete already is taken as it is, a partial one is continued. Raises UserError with
    every mirror's reason and the way to download by hand.
    """
    archive = folder / ARCHIVE_NAME
    if archive.is_file():
        print(f"Using the archive downloaded before: {archive}")
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    mirrors = {
        "Hugging Face": lambda: download_from_hub(folder),
        "Google Drive": lambda: download_from_drive(archive, progress=progress),
    }
    reasons = []
    for mirror, download in mirrors.items():
        print(f"Downloading {ARCHIVE_NAME} from {mirror} …")
        try:
            download()
            return archive
        except DownloadError as failure:
            reasons.append(f"  {mirror}: {failure}")
            print(f"{mirror} did not deliver: {failure}")
    raise UserError(
        "VTAB-1K could not be downloaded:\n" + "\n".join(reasons) + "\n"
        "Check the network and run the same command again: it continues where it stopped.\n"
        "Or download by hand, on any machine, from\n"
        f"  {HUB_PAGE}\n"
        f"  {DRIVE_PAGE}\n"
        f"and run `python scripts/prepare_vtab1k.py --zip PATH/TO/{ARCHIVE_NAME}`."
    )


def download_from_hub(folder: Path) -> None:
    """Puts the archive into `folder` with huggingface_hub, which resumes and shows its own progress bar."""
    from huggingface_hub import hf_hub_download  # slow to import, and only downloads need it

    try:
        hf_hub_download(repo_id=HUB_DATASET, filename=ARCHIVE_NAME, repo_type="dataset", local_dir=folder)
    except Exception as error:  # the hub client's own, its HTTP library's and the system's errors, by version
        raise DownloadError(_first_line(error)) from error


def download_from_drive(
    archive: Path, *, open_url: OpenUrl | None = None, progress: ProgressCallback | None = None
) -> None:
    """Downloads the archive from Google Drive, answering its question about files too big to scan."""
    query = {"id": DRIVE_FILE, "export": "download", "confirm": "t"}
    for _ in range(2):
        try:
            download(f"{_DRIVE_URL}?{urllib.parse.urlencode(query)}", archive, open_url=open_url, progress=progress)
            return
        except _WebPageError as page:
            answers = _hidden_inputs(page.text)
            if "confirm" not in answers:
                break
            query |= answers
    raise DownloadError("it sent a web page instead of the file, most likely because of its daily download limit.")


def download(
    url: str,
    target: Path,
    *,
    open_url: OpenUrl | None = None,
    progress: ProgressCallback | None = None,
    pause_seconds: float = 2.0,
) -> None:
    """Downloads `url` (https only) to `target` through `target.part`, continuing a partial file.

    A broken connection is taken up again after a pause; after three tries in a row without a new byte it
    raises DownloadError. open_url: stands in for the network in tests. progress: in bytes.
    """
    open_url = open_url or _open_https
    part = target.with_name(f"{target.name}.part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _continue_part(url, part, open_url, progress)
            part.replace(target)
            return
        except (OSError, HTTPException) as error:
            if getattr(error, "code", None) == 416:  # more bytes here than there: of another file, so start over
                part.unlink(missing_ok=True)
            elif _is_refusal(error):
                raise DownloadError(_first_line(error)) from error
            failures = 1 if _size(part) > before else failures + 1
            if failures == _TRIES_WITHOUT_PROGRESS:
                raise DownloadError(_first_line(error)) from error
            time.sleep(pause_seconds * failures)


def sha256_file(file: Path, progress: ProgressCallback | None = None) -> str:
    """sha256 of a file in hex. progress: in bytes."""
    meter = ProgressMeter(file.stat().st_size, progress)
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            meter.advance(len(block))
    return digest.hexdigest()


class _WebPageError(Exception):
    """The server sent a web page where a file was expected."""

    def __init__(self, text: str) -> None:
        super().__init__("a web page")
        self.text = text


def _continue_part(url: str, part: Path, open_url: OpenUrl, progress: ProgressCallback | None) -> None:
    """One connection: appends to `part` until the file is complete. Raises OSError when it ends early."""
    have = _size(part)
    headers = {"User-Agent": "mambapeft-vision"}
    if have:
        # One byte less than needed: a server answers a range that starts at the end with an error.
        have -= 1
        headers["Range"] = f"bytes={have}-"
    with open_url(urllib.request.Request(url, headers=headers)) as response:
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise _WebPageError(response.read(_BLOCK).decode("utf-8", "replace"))
        start, total = _content_range(response, have)
        meter = ProgressMeter(total, progress, resumed=start)
        with open(part, "r+b" if part.exists() else "wb") as stream:
            stream.seek(start)
            stream.truncate()
            while block := response.read(_BLOCK):
                stream.write(block)
                meter.advance(len(block))
            size = stream.tell()
    if total is not None and size != total:
        raise OSError(f"the connection ended after {size:,} of {total:,} bytes")


def _content_range(response: Any, have: int) -> tuple[int, int | None]:
    """(first byte of the answer, total size or None). A server that cannot resume starts at 0."""
    if response.status == 206:
        positions, _, total = response.headers["Content-Range"].removeprefix("bytes ").partition("/")
        start = int(positions.partition("-")[0])
        if start != have:
            raise OSError(f"asked for the bytes from {have:,} on, got those from {start:,} on")
        return start, int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length")
    return 0, int(length) if length is not None else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _is_refusal(error: Exception) -> bool:
    """Whether the server answered, and would answer the same again (403, 404 …)."""
    return isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in (408, 429)


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from TLS to plain text."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://"):
            raise OSError(f"refused to follow a redirect to {newurl[:100]}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open_https(request: urllib.request.Request) -> Any:
    if request.type != "https":
        raise ValueError(f"{request.full_url}: only https is allowed")
    context = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    return urllib.request.build_opener(_HttpsOnly, context).open(request, timeout=_TIMEOUT_SECONDS)


def _hidden_inputs(page: str) -> dict[str, str]:
    """Name and value of the hidden inputs of a form: Drive's confirmation token and the like."""
    inputs: dict[str, str] = {}

    class Collect(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            if tag == "input" and values.get("type") == "hidden" and values.get("name"):
                inputs[str(values["name"])] = values.get("value") or ""

    Collect().feed(page)
    return inputs


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
