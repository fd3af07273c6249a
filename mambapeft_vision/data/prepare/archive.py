"""Brings task folders into place from a zip or from a folder; nothing is ever written outside the target.

Each task is put together in a hidden folder beside its place and renamed when complete, so a task folder is there
completely or not at all. After an interruption the same command continues with the missing tasks.
"""

import errno
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from mambapeft_vision.data.image_list import parse_list
from mambapeft_vision.data.preprocessing import MAX_IMAGE_BYTES
from mambapeft_vision.data.tasks import SPLITS, Task
from mambapeft_vision.utils.atomic import atomic_folder
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.progress import ProgressCallback, ProgressMeter
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import open_plain, open_zip

MAX_BYTES = 20_000_000_000
MAX_ARCHIVE_BYTES = 1 << 40
MAX_MEMBERS = 1_000_000  # VTAB-1K has some 430,000 images
MAX_FOLDERS = 100_000
MAX_DEPTH = 16  # parts of a path
_LONGEST_NAME = 255  # bytes of one part of a path, as file systems have it
_LONGEST_PATH = 1024
_DISK_BLOCK = 4096  # bytes that a file or a folder takes at least
_COPY_BLOCK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file of an archive and its path inside its task's folder."""

    info: zipfile.ZipInfo
    path: PurePosixPath


def extract_tasks(
    archive: Path,
    root: Path,
    tasks: Sequence[Task],
    *,
    max_bytes: int = MAX_BYTES,
    progress: ProgressCallback | None = None,
) -> None:
    """Extracts the folders of `tasks` from a zip into `root`; folders around them (`vtab-1k/`) are left out.

    Args:
        max_bytes: cap on the extracted size.
        progress: called with the bytes extracted.

    Raises:
        UserError: for a damaged, unsafe or incomplete archive.
    """
    try:
        with (
            open_plain(archive, max_bytes=MAX_ARCHIVE_BYTES, follow_links=True) as file,
            open_zip(file, str(archive), max_members=MAX_MEMBERS) as opened,
        ):
            members = _members_by_task(archive, opened.infolist(), tasks)
            _check_size(archive, members, max_bytes, root)
            meter = ProgressMeter(sum(_size(files) for files in members.values()), progress)
            for folder, files in members.items():
                with _in_place(root / folder) as temporary:
                    for member in files:
                        target = temporary / member.path
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with _open_member(opened, member.info) as stream, open(target, "xb") as out:
                            shutil.copyfileobj(stream, out, _COPY_BLOCK)
                        meter.advance(member.info.file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise _damaged(archive, error) from error


def _open_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    try:
        return opened.open(info)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise zipfile.BadZipFile(f"{plain(info.filename)} begins before the file does") from error
        raise


def _damaged(archive: Path, error: Exception) -> UserError:
    return UserError(
        f"{archive} is damaged or not a zip file ({error}). Delete it and download it again, with "
        "`mambapeft prepare vtab1k` or by hand as data/README.md shows."
    )


def copy_tasks(
    source: Path,
    root: Path,
    tasks: Sequence[Task],
    *,
    max_bytes: int = MAX_BYTES,
    progress: ProgressCallback | None = None,
) -> None:
    """Copies the folders of `tasks` from `source`, or from a folder right inside it, into `root`.

    It copies the list files and the images that they name. Missing images are left to the verification.

    Args:
        max_bytes: cap on the copied size.
        progress: called with the files copied.

    Raises:
        UserError: when a task is missing or too large, or names anything but plain files.
    """
    folders = {task: _find_task_folder(source, task) for task in tasks}
    for task, folder in folders.items():
        paths = _listed_paths(folder, task)
        _check_space(str(folder), sum(_disk_bytes(size) for size in paths.values()), max_bytes, root)
        meter = ProgressMeter(len(paths), progress)
        with _in_place(root / task.folder) as temporary:
            for path, size in sorted(paths.items()):
                _copy(folder / path, temporary / path, size)
                meter.advance()


def _listed_paths(folder: Path, task: Task) -> dict[str, int]:
    """The list files and the images they name that are there, with their sizes in bytes."""
    names = {f"{split}.txt" for split in SPLITS if (folder / f"{split}.txt").exists()}
    paths = set(names)
    for name in names:
        listing, _ = parse_list(folder / name, task.num_classes)
        paths |= {entry.path for entry in listing.entries}
    sizes = {}
    for path in paths:
        try:
            with open_plain(folder / path, max_bytes=MAX_IMAGE_BYTES, follow_links=True) as file:
                sizes[path] = os.fstat(file.fileno()).st_size
        except OSError:  # left to the verification
            continue
    return sizes


def _copy(source: Path, target: Path, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_plain(source, max_bytes=size, follow_links=True) as file, open(target, "xb") as out:
        left = size
        while left and (block := file.read(min(left, _COPY_BLOCK))):
            out.write(block)
            left -= len(block)


@contextmanager
def _in_place(folder: Path) -> Iterator[Path]:
    """Yields a new folder that is renamed to `folder` on success. Raises UserError if `folder` exists."""
    if folder.exists():
        raise UserError(f"{folder} exists: expected a new folder. Delete it, or leave {folder.name} out with --tasks.")
    with atomic_folder(folder) as temporary:
        yield temporary


def safe_path(info: zipfile.ZipInfo) -> PurePosixPath:
    """The member's path. Raises UserError unless it is a plain file or folder and stays inside the target."""
    name = info.filename
    mode = stat.S_IFMT(info.external_attr >> 16)
    parts = name.split("/")
    if not name:
        reason = "it has no name"
    elif len(name.encode("utf-8", "surrogateescape")) > _LONGEST_PATH or len(parts) > MAX_DEPTH:
        reason = f"its path is longer than {_LONGEST_PATH:,} bytes or {MAX_DEPTH} parts"
    elif name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        reason = "its path leaves the target folder"
    elif mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "it is a link or a special file"
    elif any(len(part.encode("utf-8", "surrogateescape")) > _LONGEST_NAME for part in parts):
        reason = f"a part of its name is longer than {_LONGEST_NAME} bytes"
    elif info.flag_bits & 0x1:
        reason = "it is encrypted"
    else:
        return PurePosixPath(name)
    raise UserError(
        f"Refused to extract member {shown(name)}: {reason}. Expected plain files inside the archive's own "
        "folder. Do not use this archive; download it again from the places in data/README.md."
    )


def _members_by_task(archive: Path, infos: Iterable[zipfile.ZipInfo], tasks: Sequence[Task]) -> dict[str, list[Member]]:
    """The files of each task. A task's folder is the one of its name that holds a list file."""
    paths: dict[PurePosixPath, zipfile.ZipInfo] = {}
    folders: set[PurePosixPath] = set()
    for info in infos:
        path = safe_path(info)  # checks every member, wanted or not
        if path in paths and not info.is_dir():
            raise UserError(f"{archive} has the member {shown(info.filename)} twice. Download it again.")
        if not info.is_dir():
            paths[path] = info
            folder = path.parent
            while folder not in folders:  # those around it are known with it
                folders.add(folder)
                folder = folder.parent
    inside = next((path for path in folders if path in paths), None)
    if inside is not None:
        raise UserError(f"{archive} has members inside of the file {shown(str(inside))}. Download it again.")
    list_files = {f"{split}.txt" for split in SPLITS}
    homes = {path.parent for path in paths if path.name in list_files}
    members: dict[str, list[Member]] = {}
    for task in tasks:
        task_homes = [home for home in homes if home.name == task.folder]
        if len(task_homes) != 1:
            found = ", ".join(sorted(map(str, task_homes))[:4]) or "none"
            raise UserError(
                f"{archive}: expected exactly one folder {task.folder}/ with list files, found {found}. "
                f"Take another archive, or leave {task.folder} out with --tasks."
            )
        members[task.folder] = []
    tasks_of_homes = {home: home.name for home in homes if home.name in members}
    for path, info in paths.items():
        home = next((parent for parent in path.parents if parent in tasks_of_homes), None)
        if home is not None:
            members[home.name].append(Member(info, path.relative_to(home)))
    return members


def _check_size(archive: Path, members: dict[str, list[Member]], max_bytes: int, root: Path) -> None:
    """Declared sizes suffice: zipfile never reads more of a member than it declares."""
    folders = {(task, parent) for task, files in members.items() for file in files for parent in file.path.parents}
    if len(folders) > MAX_FOLDERS:
        raise UserError(f"{archive} has {len(folders):,} folders: expected at most {MAX_FOLDERS:,}. Take another one.")
    declared = sum(_size(files) for files in members.values())
    if declared > max_bytes:
        raise UserError(
            f"{archive} would extract to {declared:,} bytes: expected at most {max_bytes:,}. "
            "Pass a larger --max-gb only if you trust this archive."
        )
    on_disk = sum(_disk_bytes(file.info.file_size) for files in members.values() for file in files)
    _check_space(str(archive), on_disk + _DISK_BLOCK * len(folders), None, root)


def _check_space(source: str, total: int, max_bytes: int | None, root: Path) -> None:
    if max_bytes is not None and total > max_bytes:
        raise UserError(
            f"{source} has {total:,} bytes: at most {max_bytes:,} are copied. Pass a larger --max-gb if you trust it."
        )
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if total > free:
        raise UserError(
            f"{source} takes {total:,} bytes, but only {free:,} are free below {root}. "
            "Free some space, take fewer tasks with --tasks, or choose another place with --root."
        )


def _disk_bytes(size: int) -> int:
    """About the bytes of disk that a file of `size` bytes takes: whole blocks, and its entry in the folder."""
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK + _DISK_BLOCK // 8


def _size(files: Iterable[Member]) -> int:
    return sum(member.info.file_size for member in files)


def _find_task_folder(source: Path, task: Task) -> Path:
    candidates = [source / task.folder, *sorted(source.glob(f"*/{task.folder}"))]
    for candidate in candidates:
        if any((candidate / f"{split}.txt").is_file() for split in SPLITS):
            return candidate
    raise UserError(
        f"{source} has no task folder {task.folder}: expected {source / task.folder}/train800val200.txt, "
        f"directly or one folder deeper. Correct --folder, or leave {task.folder} out with --tasks."
    )
