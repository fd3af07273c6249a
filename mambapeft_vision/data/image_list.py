"""List files: which image has which label, one `images/train800val200/000000.jpg 12` a line.

Paths are relative to the task's folder and may not leave it. Blank lines are allowed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from mambapeft_vision.utils.errors import UserError

_LINE = re.compile(r"(?P<path>\S.*?)\s+(?P<label>[+-]?[0-9]+)")


@dataclass(frozen=True)
class Entry:
    """One line: `path` relative to the task's folder, `label`, and the `line` number (from 1)."""

    path: str
    label: int
    line: int


@dataclass(frozen=True)
class ImageList:
    """A parsed list file. `remedy` is the sentence that ends every error about its images."""

    folder: Path
    file: Path
    entries: tuple[Entry, ...]
    sha256: str
    remedy: str = ""

    def __len__(self) -> int:
        return len(self.entries)

    def labels(self) -> Tensor:
        """Labels in list order, int64 [n]."""
        return torch.tensor([entry.label for entry in self.entries], dtype=torch.int64)

    def path(self, entry: Entry) -> Path:
        return self.folder / entry.path

    def error(self, entry: Entry, what: str) -> UserError:
        """The error that `what` is wrong with the image of `entry`, naming image, file and line."""
        return UserError(f"{self.file}:{entry.line}: {self.path(entry)}: {what} {self.remedy}".rstrip())


def parse_list(file: Path, num_classes: int, *, remedy: str = "") -> tuple[ImageList, list[str]]:
    """Reads `file` and returns its good lines together with a text `file:line: problem` for every other."""
    content = file.read_bytes()
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            entry = _parse_line(raw, number, num_classes)
            if entry is None:
                continue
            if entry.path in entries:
                raise _LineError(f"{entry.path} is listed before, in line {entries[entry.path].line}")
        except _LineError as problem:
            problems.append(f"{file}:{number}: {problem}.")
            continue
        entries[entry.path] = entry
    if not entries and not problems:
        problems.append(f"{file}: the list is empty; expected a line `image label` for every image.")
    listing = ImageList(
        folder=file.parent,
        file=file,
        entries=tuple(entries.values()),
        sha256=hashlib.sha256(content).hexdigest(),
        remedy=remedy,
    )
    return listing, problems


def read_list(file: Path, num_classes: int, *, remedy: str) -> ImageList:
    """Reads a list file; raises UserError for a missing file and for the first bad line."""
    if file.is_dir():
        raise UserError(f"{file} is a folder: expected the list file. {remedy}")
    if file.parent.is_file():
        raise UserError(f"{file.parent} is a file: expected a folder with the list file {file.name}. {remedy}")
    if not file.is_file():
        missing = file.parent if not file.parent.is_dir() else file
        raise UserError(f"{missing} is missing: expected the list file {file}. {remedy}")
    listing, problems = parse_list(file, num_classes, remedy=remedy)
    if problems:
        more = f" ({len(problems) - 1:,} more bad lines follow.)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more} {remedy}")
    return listing


def missing_images(listing: ImageList) -> list[Entry]:
    """Entries whose image file does not exist. Lists each folder once: 70,000 single stats are slow."""
    by_folder: dict[Path, list[Entry]] = defaultdict(list)
    for entry in listing.entries:
        by_folder[listing.path(entry).parent].append(entry)
    missing = []
    for folder, entries in by_folder.items():
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        missing += [entry for entry in entries if PurePosixPath(entry.path).name not in present]
    return sorted(missing, key=lambda entry: entry.line)


class _LineError(Exception):
    """What is wrong with one line."""


def _parse_line(raw: bytes, number: int, num_classes: int) -> Entry | None:
    """The entry of one line, None for a blank one. Raises _LineError."""
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise _LineError(f"{raw[:80]!r} is not UTF-8 text ({error.reason})") from error
    if not text:
        return None
    match = _LINE.fullmatch(text)
    if match is None:
        raise _LineError(f"cannot read {text[:80]!r}: expected `image label`, such as `images/test/000000.jpg 3`")
    path = _checked_path(match["path"])
    label = int(match["label"]) if len(match["label"]) < 20 else num_classes
    if not 0 <= label < num_classes:
        raise _LineError(
            f"label {match['label'][:20]} is out of range: expected 0 to {num_classes - 1} ({num_classes} classes)"
        )
    return Entry(path, label, number)


def _checked_path(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", text) or set(text) & {"\\", "\0"}:
        raise _LineError(
            f"path {text[:80]!r} is not inside the task's folder: expected a relative path with / and no .."
        )
    return str(path)
