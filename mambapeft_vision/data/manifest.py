"""`manifest.json`: one fingerprint per task, so that a result says which images it was measured on.

A task's sha256 is taken over lines `<sha256 of the file>  <path>\\n`, sorted by path, for its list files and
every image they name. It is written by `mambapeft prepare vtab1k` next to the task folders.

An entry counts while the files have the states they had when it was written (verified.py); files in another state are
read again, and count as verified if their content is. A manifest can come with foreign data, so it proves nothing when
somebody's result is computed again: `manifest_hash(..., check_images=True)` reads all images instead.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mambapeft_vision.data.image_list import Entry, ImageList
from mambapeft_vision.data.preprocessing import MAX_IMAGE_BYTES
from mambapeft_vision.data.verified import States, listed_images, note, noted, state_of, states_of
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.console import warn
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_json
from mambapeft_vision.utils.lock import one_at_a_time
from mambapeft_vision.utils.threads import map_in_threads
from mambapeft_vision.utils.typed import build
from mambapeft_vision.utils.untrusted import open_plain, read_json

MANIFEST_FILE = "manifest.json"
UNVERIFIED = "unverified:"  # begins the fingerprint of a task without an entry
_FORMAT = 1
_REMEDY = "Delete it and verify the data again to write a new one."
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TaskEntry:
    """The manifest's entry of a verified task.

    Args:
        sha256: sha256 of the whole task.
        lists: sha256 of each list file by split.
        images, bytes: number and total size of the image files.
        classes_seen: number of different labels by split.
        decoded: whether every image was decoded (else only its header was read).
    """

    sha256: str
    lists: dict[str, str]
    images: int
    bytes: int
    classes_seen: dict[str, int]
    decoded: bool


@dataclass
class _Manifest:
    """The file.

    Args:
        source: where the tasks came from.
        checksums: of the entries, by task; entries of earlier releases have none.
    """

    format: int
    tasks: dict[str, TaskEntry]
    source: dict[str, Any] | None = None
    checksums: dict[str, str] | None = None

    def __post_init__(self) -> None:
        hashes = [digest for entry in self.tasks.values() for digest in (entry.sha256, *entry.lists.values())]
        if self.format != _FORMAT or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes):
            raise UserError(f"format {self.format}, or a hash that is no sha256")


def task_sha256(file_hashes: Mapping[str, str]) -> str:
    """Fingerprint of a task from the sha256 of each file, by path relative to the task's folder."""
    lines = (f"{file_hashes[path]}  {path}\n" for path in sorted(file_hashes))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_entry(root: Path, folder: str) -> TaskEntry | None:
    """The manifest's entry of the task in `root/folder`; None where it has not been verified.

    Raises: UserError for a damaged entry.
    """
    manifest = _read(root)
    entry = manifest.tasks.get(folder)
    if entry is not None and (manifest.checksums or {}).get(folder, checksum := _checksum(entry)) != checksum:
        raise UserError(
            f"{root / MANIFEST_FILE}: the entry of {folder} is not as it was written: damaged or changed by hand. "
            f"Delete the entry and verify the task again (`mambapeft prepare vtab1k --verify-only` for one of VTAB-1K)"
        )
    return entry


def write_entry(root: Path, folder: str, entry: TaskEntry, states: States | None = None) -> None:
    """Adds or replaces the entry of one task.

    Args:
        states: of its images just before they were read; None: the present ones.
    """
    with _changed(root) as manifest:
        manifest.tasks = dict(sorted({**manifest.tasks, folder: entry}.items()))
        manifest.checksums = dict(sorted({**(manifest.checksums or {}), folder: _checksum(entry)}.items()))
    with suppress(OSError, UserError):  # without a note the images are read again
        note(root / folder, entry.sha256, states or states_of(root / folder, entry.lists))


def drop_entry(root: Path, folder: str) -> None:
    """Removes the entry of a task that no longer passes."""
    if folder in _read(root).tasks:
        with _changed(root) as manifest:
            manifest.tasks.pop(folder, None)
            (manifest.checksums or {}).pop(folder, None)


def write_source(root: Path, source: Mapping[str, Any]) -> None:
    """Notes where the tasks came from: archive name, size and sha256, or a folder."""
    with _changed(root) as manifest:
        manifest.source = dict(source)


def manifest_hash(
    task_folder: Path, listings: Iterable[ImageList], *, check_images: bool = False, read_images: bool = True
) -> str:
    """Fingerprint of a task for result files; this function alone decides whether data are the same.

    The verified sha256 where the manifest has an entry for exactly these list files, and the images are as verified;
    else `unverified:` and a sha256 over the list files and the sizes of their images, which is quick but blind to
    changed pixels (these are for `images_digest`).

    Args:
        check_images: read and hash all files of a verified task again instead of trusting its entry, for data that
            came with somebody's result. Files that differ give `changed:` and their sha256.
        read_images: read and hash them where the images are in another state than when they were verified; False
            trusts the entry.
    """
    listings = list(listings)
    entry = read_entry(task_folder.parent, task_folder.name)
    if entry is not None:
        other = ", ".join(str(one.file) for one in listings if entry.lists.get(one.file.stem) != one.sha256)
        if not other and check_images:
            actual = _content_sha256(task_folder, entry)
            return actual if actual == entry.sha256 else f"changed:{actual}"
        if not other and (not read_images or is_as_verified(task_folder, entry, listings)):
            return entry.sha256
        warn(
            f"{other or f'{task_folder}: images'}: not as verified in {task_folder.parent / MANIFEST_FILE}, so that "
            "the data count as other data; verify them again if the change is meant",
            once=True,
        )
    hashes = {listing.file.name: listing.sha256 for listing in listings}
    for listing in listings:
        folder = os.fspath(listing.folder)
        hashes |= {item.path: str(os.path.getsize(f"{folder}/{item.path}")) for item in listing.entries}
    return f"{UNVERIFIED}{task_sha256(hashes)}"


def is_as_verified(task_folder: Path, entry: TaskEntry, listings: Iterable[ImageList]) -> bool:
    """Whether the images have their verified content; read, once a process, only if they are in another state.

    Raises: UserError naming an image that cannot be read.
    """
    known = noted(task_folder, entry.sha256)
    if all(known.get(listing.file.stem) == state_of(listing.whole or listing) for listing in listings):
        return True
    states = states_of(task_folder, entry.lists)  # before they are read: what changes meanwhile is noticed next time
    key = (str(task_folder), entry.sha256, *states.items())
    if key not in known_contents:
        known_contents[key] = _content_sha256(task_folder, entry)
        if known_contents[key] == entry.sha256:  # only copied or touched
            note(task_folder, entry.sha256, states)
    return known_contents[key] == entry.sha256


known_contents: dict[tuple[object, ...], str] = {}  # task and state of its files → sha256 of their content


def images_digest(listing: ImageList) -> bytes:
    """Fingerprint of the content of a list's images, in list order; reads them all, once a process.

    Raises:
        UserError: naming the image that cannot be read.
    """

    state = f"{listing.folder} {state_of(listing)}"
    if state not in known_digests:
        hashed = partial(image_hash, listing, algorithm="blake2b")
        known_digests[state] = hashlib.sha256(b"".join(map_in_threads(hashed, listing.entries))).digest()
    return known_digests[state]


known_digests: dict[str, bytes] = {}  # folder and state of the images → `images_digest`


def _content_sha256(task_folder: Path, entry: TaskEntry) -> str:
    """The task's sha256 from its present files, all read."""
    hashes: dict[str, str] = {}
    for split in entry.lists:
        listing = listed_images(task_folder, split)
        hashes[listing.file.name] = listing.sha256
        images = [item for item in listing.entries if item.path not in hashes]
        digests = map_in_threads(partial(image_hash, listing, algorithm="sha256"), images)
        hashes |= {item.path: digest.hex() for item, digest in zip(images, digests, strict=True)}
    return task_sha256(hashes)


def _checksum(entry: TaskEntry) -> str:
    return sha256_json(asdict(entry))


def image_hash(listing: ImageList, entry: Entry, algorithm: str) -> bytes:
    digest = hashlib.new(algorithm)
    try:
        with open_plain(listing.path(entry), max_bytes=MAX_IMAGE_BYTES, follow_links=True) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise listing.error(entry, f"cannot be read ({error.strerror}).") from error
    except UserError as error:
        raise listing.error(entry, f"{error}.") from error
    return digest.digest()


def _read(root: Path) -> _Manifest:
    file = root / MANIFEST_FILE
    if not file.exists():
        return _Manifest(_FORMAT, {})
    try:
        return build(_Manifest, read_json(file), str(file))
    except UserError as error:
        raise UserError(f"{file} is not a manifest of this version ({error}). {_REMEDY}") from error


@contextmanager
def _changed(root: Path) -> Iterator[_Manifest]:
    """The manifest, open for changes and locked: other processes change it before or after."""
    with one_at_a_time(root / MANIFEST_FILE):
        manifest = _read(root)
        yield manifest
        content = asdict(manifest)
        write_json(root / MANIFEST_FILE, {key: value for key, value in content.items() if value is not None})
