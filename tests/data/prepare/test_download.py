"""Downloads against a server that lives in this file: resuming, refusing, giving up."""

import email.message
import io
import urllib.error
import urllib.request

import huggingface_hub
import pytest

from mambapeft_vision.data.prepare import download as module
from mambapeft_vision.data.prepare.download import DownloadError, download, download_from_drive, fetch_archive
from mambapeft_vision.utils.errors import UserError

CONTENT = bytes(range(256)) * 40
URL = "https://example.org/file.zip"


class Response(io.BytesIO):
    def __init__(self, body, status, headers):
        super().__init__(body)
        self.status = status
        self.headers = email.message.Message()
        for key, value in headers.items():
            self.headers[key] = value


class Server:
    """Answers range requests for CONTENT; breaks the connection after `break_after` bytes, `breaks` times."""

    def __init__(self, breaks=0, break_after=3000, ranges=True):
        self.breaks = breaks
        self.break_after = break_after
        self.ranges = ranges
        self.starts = []

    def __call__(self, request):
        wanted = request.get_header("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        self.starts.append(start)
        body = CONTENT[start:]
        headers = {"Content-Type": "application/zip", "Content-Length": str(len(body))}
        if wanted and self.ranges:
            headers["Content-Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        if self.breaks:
            self.breaks -= 1
            body = body[: self.break_after]
        return Response(body, 206 if wanted and self.ranges else 200, headers)


def refuse(code):
    def open_url(request):
        raise urllib.error.HTTPError(request.full_url, code, "refused", email.message.Message(), None)

    return open_url


def offline(request):
    raise urllib.error.URLError("no network")


def test_a_download_ends_complete_and_reports_bytes(tmp_path):
    reports = []
    download(URL, tmp_path / "file.zip", open_url=Server(), progress=reports.append)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.zip"]
    assert (reports[-1].done, reports[-1].total) == (len(CONTENT), len(CONTENT))


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path):
    server = Server(breaks=3)
    download(URL, tmp_path / "file.zip", open_url=server, pause_seconds=0)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert len(server.starts) == 4 and server.starts[1] in (2999, 3000)


def test_a_later_run_continues_the_partial_file(tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:5000])
    server = Server()
    reports = []
    download(URL, tmp_path / "file.zip", open_url=server, progress=reports.append)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert server.starts[0] in (4999, 5000)
    assert reports[-1].resumed == server.starts[0]


def test_a_partial_file_that_was_complete_is_finished(tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT)
    download(URL, tmp_path / "file.zip", open_url=Server())
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_server_that_cannot_resume_starts_over(tmp_path):
    (tmp_path / "file.zip.part").write_bytes(b"x" * 20_000)
    download(URL, tmp_path / "file.zip", open_url=Server(ranges=False))
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_it_gives_up_when_nothing_comes_any_more_and_keeps_what_it_has(tmp_path):
    server = Server(breaks=1)
    answers = iter([server, offline, offline, offline])
    with pytest.raises(DownloadError, match="no network"):
        download(URL, tmp_path / "file.zip", open_url=lambda request: next(answers)(request), pause_seconds=0)
    assert (tmp_path / "file.zip.part").read_bytes() == CONTENT[:3000]


def test_a_partial_file_longer_than_the_whole_starts_over(tmp_path):
    (tmp_path / "file.zip.part").write_bytes(b"x" * 20_000)
    answers = iter([refuse(416), Server()])
    download(URL, tmp_path / "file.zip", open_url=lambda request: next(answers)(request), pause_seconds=0)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_refusal_is_not_tried_again(tmp_path):
    answers = iter([refuse(404)])
    with pytest.raises(DownloadError, match="404"):
        download(URL, tmp_path / "file.zip", open_url=lambda request: next(answers)(request), pause_seconds=0)


def test_bytes_from_another_place_than_asked_for_are_not_taken(tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:5000])
    headers = {"Content-Range": f"bytes 6000-{len(CONTENT) - 1}/{len(CONTENT)}"}
    with pytest.raises(DownloadError, match="got those from 6,000 on"):
        download(
            URL,
            tmp_path / "file.zip",
            open_url=lambda request: Response(CONTENT[6000:], 206, headers),
            pause_seconds=0,
        )
    assert (tmp_path / "file.zip.part").read_bytes() == CONTENT[:5000]


def test_only_tls_is_used():
    with pytest.raises(ValueError, match="only https"):
        module._open_https(urllib.request.Request("http://example.org/file.zip"))
    with pytest.raises(OSError, match="not https"):
        module._HttpsOnly().redirect_request(
            urllib.request.Request(URL), None, 302, "Found", email.message.Message(), "http://example.org/"
        )


def page(text):
    return lambda request: Response(text.encode(), 200, {"Content-Type": "text/html; charset=utf-8"})


def test_drives_question_is_answered_with_its_token(tmp_path):
    form = '<form><input type="hidden" name="confirm" value="yes"><input type="hidden" name="uuid" value="1-2"></form>'
    answers = iter([page(form), Server()])
    urls = []

    def open_url(request):
        urls.append(request.full_url)
        return next(answers)(request)

    download_from_drive(tmp_path / "file.zip", open_url=open_url)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert "confirm=yes" in urls[1] and "uuid=1-2" in urls[1]


def test_any_other_page_of_drive_is_a_failure(tmp_path):
    with pytest.raises(DownloadError, match="a web page instead of the file"):
        download_from_drive(tmp_path / "file.zip", open_url=page("<p>Quota exceeded</p>"))
    assert not (tmp_path / "file.zip").exists()


def test_offline_gives_both_reasons_and_the_way_by_hand(tmp_path, monkeypatch):
    def hub_is_offline(**arguments):
        raise ConnectionError("hub unreachable\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub_is_offline)
    monkeypatch.setattr(module, "_open_https", offline)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError) as error:
        fetch_archive(tmp_path / "download")
    text = str(error.value)
    assert "Hugging Face: ConnectionError: hub unreachable\n" in text and "Google Drive: URLError" in text
    assert module.HUB_PAGE in text and module.DRIVE_PAGE in text
    assert "python scripts/prepare_vtab1k.py --zip" in text


def test_the_second_mirror_is_used_when_the_first_fails(tmp_path, monkeypatch):
    def hub_is_offline(**arguments):
        raise ConnectionError("hub unreachable")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub_is_offline)
    monkeypatch.setattr(module, "_open_https", Server())
    assert fetch_archive(tmp_path).read_bytes() == CONTENT


def test_the_hub_is_asked_for_the_dataset_file(tmp_path, monkeypatch):
    asked = []

    def deliver(**arguments):
        asked.append(arguments)
        (arguments["local_dir"] / arguments["filename"]).write_bytes(CONTENT)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    assert fetch_archive(tmp_path).read_bytes() == CONTENT
    assert fetch_archive(tmp_path).read_bytes() == CONTENT
    assert asked == [
        {"repo_id": "XiN0919/VTAB-1k", "filename": "vtab-1k.zip", "repo_type": "dataset", "local_dir": tmp_path}
    ]
