"""The state of a verified task's files, by which a change is noticed without reading them.

The manifest says which content was verified. Whether the files still have it is told by their sizes and times: the
time of change (ctime) is newer after every write, whoever restores the time of modification. The times are those of
one machine, so they are kept in a hidden file beside the manifest. Where they differ, the files are read again.
"""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mambapeft_vision.data.image_list import ImageList, parse_list
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import build
from mambapeft_vision.utils.untrusted import read_json

States = dict[str, str]  # the state of a list's images by the list's name


@dataclass(frozen=True)
class _Noted:
    """The file: the states that the images had when the task's content had this sha256."""

    sha256: str
    states: States


def state_of(listing: ImageList) -> str:
    """Changes with the paths, sizes and times of a list's images (their content is not read); sha256 in hex.

    A missing image is a state, too.
    """
    state = hashlib.sha256()
    parents: dict[str, str] = {}
    for entry in listing.entries:
        parent, _, name = entry.path.rpartition("/")
        if parent not in parents:
            parents[parent] = os.fspath(listing.path(entry).parent)
        try:
            found = os.stat(f"{parents[parent]}/{name}")
            line = f"{entry.path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n"
        except OSError:
            line = f"{entry.path} missing\n"
        state.update(line.encode(errors="surrogateescape"))
    return state.hexdigest()


def listed_images(task_folder: Path, split: str) -> ImageList:
    """The list of a split for its images alone: labels of any number of classes, one or several an image."""
    file, many = task_folder / f"{split}.txt", 1 << 62
    listing, problems = parse_list(file, many)
    return parse_list(file, many, several=True)[0] if problems else listing


def states_of(task_folder: Path, splits: Iterable[str]) -> States:
    """The present state of each split's images. Raises UserError for a list that cannot be read."""
    return {split: state_of(listed_images(task_folder, split)) for split in splits}


def note(task_folder: Path, sha256: str, states: States) -> None:
    """Notes that a task had the content `sha256` while its files had these states. A disk may refuse it."""
    with suppress(OSError, UserError):  # then the files are read again next time
        write_json(_file(task_folder), asdict(_Noted(sha256, states)))


def noted(task_folder: Path, sha256: str) -> States:
    """The states that belong to the content `sha256`; none where there is no note of it, or a damaged one."""
    try:
        found = build(_Noted, read_json(_file(task_folder)), "")
    except (OSError, UserError):
        return {}
    return found.states if found.sha256 == sha256 else {}


def _file(task_folder: Path) -> Path:
    return task_folder.with_name(f".{task_folder.name}.verified.json")
