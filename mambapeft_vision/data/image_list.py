"""List files: which image has which label, one `images/train800val200/000000.jpg 12` a line.

Where images have several labels, these are divided by commas (`images/a.jpg 3,7`); `-` stands for none.

Paths are relative to the task's folder and may not leave it. Blank lines are allowed.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import MAX_LINES, read_bytes

MAX_LIST_BYTES = 200_000_000
MAX_PROBLEMS = 10_000  # bad lines that are named; of more there is only the number
_SHOWN = 80  # characters of a bad line
_LABEL = re.compile(r"[+-]?[0-9]+")
_LABELS = re.compile(r"-|[0-9]+(,[0-9]+)*")
MOST_CLASSES = 1_000_000  # where their number is counted, not given


class Entry(NamedTuple):
    """One line: `path` relative to the task's folder, `label`, and the `line` number (from 1).

    Where images have several labels, `labels` holds them, and `label` the first one or -1.
    """

    path: str
    label: int
    line: int
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageList:
    """A parsed list file.

    Args:
        remedy: the sentence that ends every error about its images.
        several: the number of classes where images have several labels, else None.
        images: the folder that `images/` of the task's folder stands for, where it is a link.
        whole: the list of the file, where this one holds some of its images.
    """

    folder: Path
    file: Path
    entries: tuple[Entry, ...]
    sha256: str
    remedy: str = ""
    several: int | None = None
    images: Path | None = None
    whole: "ImageList | None" = None

    def __len__(self) -> int:
        return len(self.entries)

    def labels(self) -> Tensor:
        """Labels in list order: int64 [n], or float32 [n, classes] of 0 and 1 where images have several."""
        if self.several is not None:
            labels = torch.zeros(len(self.entries), self.several)
            for row, entry in enumerate(self.entries):
                labels[row, list(entry.labels)] = 1
            return labels
        return torch.tensor([entry.label for entry in self.entries], dtype=torch.int64)

    def path(self, entry: Entry) -> Path:
        if self.images is not None and entry.path.startswith("images/"):
            return self.images / entry.path.removeprefix("images/")
        return self.folder / entry.path

    def chosen(self, rows: Sequence[int]) -> "ImageList":
        """The list of some of the images."""
        return replace(self, entries=tuple(self.entries[row] for row in rows), whole=self.whole or self)

    def error(self, entry: Entry, what: str) -> UserError:
        """The error that `what` is wrong with the image of `entry`, naming image, file and line."""
        return UserError(f"{self.file}:{entry.line}: {plain(self.path(entry), 1_000)}: {what} {self.remedy}".rstrip())


def parse_list(file: Path, num_classes: int, *, remedy: str = "", several: bool = False) -> tuple[ImageList, list[str]]:
    """Reads `file` and returns its good lines together with a text `file:line: problem` for every other.

    Args:
        several: whether an image may have any number of labels.

    After `MAX_PROBLEMS` bad lines the last text gives the number of the others. Raises UserError unless `file` is a
    plain file.
    """
    content = read_bytes(file, max_bytes=MAX_LIST_BYTES, follow_links=True)
    lines = content.count(b"\n")
    if lines > MAX_LINES:
        raise UserError(f"{plain(file)} has {lines:,} lines; expected at most {MAX_LINES:,}. Split the task")
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    bad = 0
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            entry = _parse_line(raw, number, num_classes, several)
            if entry is None:
                continue
            if entry.path in entries:
                raise _LineError(f"{plain(entry.path, _SHOWN)} is listed before, in line {entries[entry.path].line}")
        except _LineError as problem:
            bad += 1
            if bad <= MAX_PROBLEMS:
                problems.append(f"{file}:{number}: {problem}.")
            continue
        entries[entry.path] = entry
    if bad > MAX_PROBLEMS:
        problems.append(f"{file}: {bad - MAX_PROBLEMS:,} more bad lines.")
    if not entries and not problems:
        problems.append(f"{file}: the list is empty; expected a line `image label` for every image.")
    listing = ImageList(
        folder=file.parent,
        file=file,
        entries=tuple(entries.values()),
        sha256=hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest(),  # the same list, whoever copied it
        remedy=remedy,
        several=num_classes if several else None,
    )
    return listing, problems


def read_list(file: Path, num_classes: int, *, remedy: str, several: bool = False) -> ImageList:
    """Reads a list file; raises UserError for a missing file and for the first bad line."""
    if file.is_dir():
        raise UserError(f"{file} is a folder: expected the list file. {remedy}")
    if file.parent.is_file():
        raise UserError(f"{file.parent} is a file: expected a folder with the list file {file.name}. {remedy}")
    if not file.exists():
        missing = file.parent if not file.parent.is_dir() else file
        raise UserError(f"{missing} is missing: expected the list file {file}. {remedy}")
    listing, problems = parse_list(file, num_classes, remedy=remedy, several=several)
    if problems:
        more = f" ({len(problems) - 1:,} more bad lines follow.)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more} {remedy}")
    return listing


def missing_images(listing: ImageList) -> list[Entry]:
    """Entries whose image file does not exist. Lists each folder once: 70,000 single stats are slow."""
    by_folder: dict[str, list[Entry]] = defaultdict(list)
    for entry in listing.entries:
        by_folder[entry.path.rpartition("/")[0]].append(entry)
    missing = []
    for entries in by_folder.values():
        folder = listing.path(entries[0]).parent
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        missing += [entry for entry in entries if entry.path.rpartition("/")[2] not in present]
    return sorted(missing, key=lambda entry: entry.line)


class _LineError(Exception):
    """A bad line; the message says what is wrong with it."""


def _parse_line(raw: bytes, number: int, num_classes: int, several: bool) -> Entry | None:
    """The entry of one line, None for a blank one. Raises _LineError. Linear in the line's length."""
    try:
        words = raw.decode("utf-8").rsplit(None, 1)
    except UnicodeDecodeError as error:
        raise _LineError(f"{raw[:_SHOWN]!r} is not UTF-8 text ({error.reason})") from error
    if not words:
        return None
    if len(words) != 2 or not (_LABELS if several else _LABEL).fullmatch(words[1]):
        text, labels = " ".join(words), "3,7" if several else "3"
        raise _LineError(
            f"cannot read {shown(text, _SHOWN)}: expected `image label`, such as `images/test/000000.jpg {labels}`"
        )
    path, digits = words[0].strip(), words[1]
    # Only such a path can leave the folder or be written in two ways; looking at each part of every path is slow.
    if (
        path[0] in "./"
        or path[1:2] == ":"
        or "//" in path
        or "/." in path
        or path[-1] == "/"
        or "\\" in path
        or "\0" in path
    ):
        path = _checked_path(path)
    found = [_checked_label(label, num_classes) for label in digits.split(",") if label != "-"]
    if several:
        return Entry(path, found[0] if found else -1, number, tuple(sorted(set(found))))
    return Entry(path, found[0], number)


def _checked_label(digits: str, num_classes: int) -> int:
    label = int(digits) if len(digits) < 20 else num_classes
    if not 0 <= label < num_classes:
        raise _LineError(
            f"label {digits[:20]} is out of range: expected 0 to {num_classes - 1} ({num_classes} classes)"
        )
    return label


def _checked_path(text: str) -> str:
    """The path without empty parts and `.`. Raises _LineError for one that leaves the folder."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", text) or set(text) & {"\\", "\0"}:
        raise _LineError(
            f"path {shown(text, _SHOWN)} is not inside the task's folder: expected a relative path with / and no .."
        )
    return str(path)
