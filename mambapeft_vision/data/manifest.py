"""`manifest.json`: one fingerprint per task, so that a result says which images it was measured on.

A task's sha256 is taken over lines `<sha256 of the file>  <path>\\n`, sorted by path, for its list files and
every image they name. It is written by `scripts/prepare_vtab1k.py` next to the task folders.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mambapeft_vision.data.image_list import ImageList
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.lock import one_at_a_time

MANIFEST_FILE = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class TaskRecord:
    """What a verified task is.

    sha256: of the whole task; lists: sha256 of each list file by split; images, bytes: number and total size
    of the image files; classes_seen: number of different labels by split; decoded: whether every image was
    decoded (else only its header was read).
    """

    sha256: str
    lists: dict[str, str]
    images: int
    bytes: int
    classes_seen: dict[str, int]
    decoded: bool


def task_sha256(file_hashes: Mapping[str, str]) -> str:
    """Fingerprint of a task from the sha256 of each file, by path relative to the task's folder."""
    lines = (f"{file_hashes[path]}  {path}\n" for path in sorted(file_hashes))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_record(root: Path, folder: str) -> TaskRecord | None:
    """The record of the task in `root/folder`; None where it has not been verified."""
    entry = _read(root)["tasks"].get(folder)
    return None if entry is None else TaskRecord(**entry)


def write_record(root: Path, folder: str, record: TaskRecord) -> None:
    """Adds or replaces the record of one task."""
    with _changed(root) as content:
        content["tasks"][folder] = asdict(record)
        content["tasks"] = dict(sorted(content["tasks"].items()))


def drop_record(root: Path, folder: str) -> None:
    """Removes the record of a task that no longer passes."""
    if read_record(root, folder) is not None:
        with _changed(root) as content:
            content["tasks"].pop(folder, None)


def write_source(root: Path, source: Mapping[str, Any]) -> None:
    """Notes where the tasks came from: archive name, size and sha256, or a folder."""
    with _changed(root) as content:
        content["source"] = dict(source)


def manifest_hash(task_folder: Path, listings: Iterable[ImageList]) -> str:
    """Fingerprint of a task for result files.

    The verified sha256 where the manifest has one for exactly these list files; else `unverified:` and a
    sha256 over the list files and the sizes of their images, which is quick but blind to changed pixels.
    """
    listings = list(listings)
    record = read_record(task_folder.parent, task_folder.name)
    if record is not None and all(record.lists.get(listing.file.stem) == listing.sha256 for listing in listings):
        return record.sha256
    hashes = {listing.file.name: listing.sha256 for listing in listings}
    for listing in listings:
        hashes |= {entry.path: str(os.path.getsize(listing.path(entry))) for entry in listing.entries}
    return f"unverified:{task_sha256(hashes)}"


def _read(root: Path) -> dict[str, Any]:
    file = root / MANIFEST_FILE
    if not file.is_file():
        return {"format": _FORMAT, "tasks": {}}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        for entry in content["tasks"].values():
            TaskRecord(**entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not a manifest of this version ({type(error).__name__}: {error}). "
            "Delete it and verify the data again to write a new one."
        ) from error
    return content


@contextmanager
def _changed(root: Path) -> Iterator[dict[str, Any]]:
    """The manifest's content, to be changed; whatever other processes change comes before or after it."""
    with one_at_a_time(root / MANIFEST_FILE):
        content = _read(root)
        yield content
        write_json(root / MANIFEST_FILE, content)
