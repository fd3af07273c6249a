"""Brings task folders into place from a zip or from a folder; nothing is ever written outside the target.

Tasks are put together in the hidden folder `.incomplete` of the target and moved out one by one when complete, so a
task folder is there completely or not at all. What an interrupted run put together is used by the next one.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mambapeft_vision.data.image_list import parse_list
from mambapeft_vision.data.tasks import SPLITS, Task
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.progress import ProgressCallback, ProgressMeter

MAX_BYTES = 20_000_000_000
MAX_MEMBERS = 2_000_000  # VTAB-1K has some 430,000 images
_LONGEST_NAME = 255  # bytes of one part of a path, as file systems have it
_SOURCE_FILE = "source.json"


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
    sha256: str,
    max_bytes: int = MAX_BYTES,
    progress: ProgressCallback | None = None,
) -> None:
    """Extracts the folders of `tasks` from a zip into `root`; folders around them (`vtab-1k/`) are left out.

    sha256: of the archive, tells whether an interrupted extraction was of the same one. max_bytes: cap on the
    extracted size. progress: in bytes. Raises UserError for a damaged, unsafe or incomplete archive.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = opened.infolist()
            if len(infos) > MAX_MEMBERS:
                raise UserError(
                    f"{archive} has {len(infos):,} members: expected at most {MAX_MEMBERS:,}. Take another archive."
                )
            members = _members_by_task(archive, infos, tasks)
            _check_size(archive, members, max_bytes, root)
            staging = _open_staging(root, {"archive": sha256})
            meter = ProgressMeter(sum(_size(files) for files in members.values()), progress)
            for folder, files in members.items():
                for member in files:
                    _extract(opened, member, staging / folder / member.path)
                    meter.advance(member.info.file_size)
                (staging / folder).rename(root / folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        if error.errno == errno.EINVAL and error.filename is None:  # a member's place before the file's beginning
            raise _damaged(archive, error) from error
        raise
    shutil.rmtree(staging)


def _damaged(archive: Path, error: Exception) -> UserError:
    return UserError(
        f"{archive} is damaged or not a zip file ({error}). Delete it and download it again, with "
        "`python scripts/prepare_vtab1k.py` or by hand as data/README.md shows."
    )


def copy_tasks(source: Path, root: Path, tasks: Sequence[Task], *, progress: ProgressCallback | None = None) -> None:
    """Copies the folders of `tasks` from `source`, or from a folder right inside it, into `root`.

    Copied are the list files and the images they name; what is missing there is left to the verification.
    progress: in files. Raises UserError when a task is not there.
    """
    folders = {task: _find_task_folder(source, task) for task in tasks}
    staging = _open_staging(root, {"folder": str(source.resolve())})
    for task, folder in folders.items():
        lists = [folder / f"{split}.txt" for split in SPLITS]
        paths = {file.name for file in lists if file.is_file()}
        for name in sorted(paths):
            listing, _ = parse_list(folder / name, task.num_classes)
            paths |= {entry.path for entry in listing.entries}
        meter = ProgressMeter(len(paths), progress)
        for path in sorted(paths):
            _copy(folder / path, staging / task.folder / path)
            meter.advance()
        (staging / task.folder).rename(root / task.folder)
    shutil.rmtree(staging)


def safe_path(info: zipfile.ZipInfo) -> PurePosixPath:
    """The member's path. Raises UserError unless it is a plain file or folder and stays inside the target."""
    name = info.filename
    path = PurePosixPath(name)
    mode = stat.S_IFMT(info.external_attr >> 16)
    if not name:
        reason = "it has no name"
    elif path.is_absolute() or ".." in path.parts or "\\" in name or re.match(r"[A-Za-z]:", name):
        reason = "its path leaves the target folder"
    elif mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "it is a link or a special file"
    elif any(len(part.encode("utf-8", "surrogateescape")) > _LONGEST_NAME for part in path.parts):
        reason = f"a part of its name is longer than {_LONGEST_NAME} bytes"
    elif info.flag_bits & 0x1:
        reason = "it is encrypted"
    else:
        return path
    raise UserError(
        f"Refused to extract member {name[:200]!r}: {reason}. Expected plain files inside the archive's own "
        "folder. Do not use this archive; download it again from the places in data/README.md."
    )


def _members_by_task(archive: Path, infos: Iterable[zipfile.ZipInfo], tasks: Sequence[Task]) -> dict[str, list[Member]]:
    """The files of each task. A task's folder is the one of its name that holds a list file."""
    paths = {}
    for info in infos:
        path = safe_path(info)  # of every member, wanted or not
        if path in paths and not info.is_dir():
            raise UserError(f"{archive} has the member {info.filename[:200]!r} twice. Download it again.")
        if not info.is_dir():
            paths[path] = info
    inside = next((path for path in paths if any(parent in paths for parent in path.parents)), None)
    if inside is not None:
        raise UserError(f"{archive} has the member {str(inside)[:200]!r} inside of a file. Download it again.")
    list_files = {f"{split}.txt" for split in SPLITS}
    homes = {path.parent for path in paths if path.name in list_files}
    members: dict[str, list[Member]] = {}
    for task in tasks:
        task_homes = [home for home in homes if home.name == task.folder]
        if len(task_homes) != 1:
            found = ", ".join(sorted(map(str, task_homes))) or "none"
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
    total = sum(_size(files) for files in members.values())
    if total > max_bytes:
        raise UserError(
            f"{archive} would extract to {total:,} bytes: expected at most {max_bytes:,}. "
            "Pass a larger --max-gb only if you trust this archive."
        )
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if total > free:
        raise UserError(
            f"{archive} extracts to {total:,} bytes, but only {free:,} are free below {root}. "
            "Free some space, take fewer tasks with --tasks, or choose another place with --root."
        )


def _size(files: Iterable[Member]) -> int:
    return sum(member.info.file_size for member in files)


def _open_staging(root: Path, source: dict[str, str]) -> Path:
    """The folder where tasks are put together; emptied unless left by a run with the same source."""
    root.mkdir(parents=True, exist_ok=True)
    staging = root / ".incomplete"
    note = staging / _SOURCE_FILE
    if staging.exists() and not (note.is_file() and json.loads(note.read_text()) == source):
        shutil.rmtree(staging)
    staging.mkdir(exist_ok=True)
    write_json(note, source)
    return staging


def _extract(opened: zipfile.ZipFile, member: Member, target: Path) -> None:
    if target.is_file() and target.stat().st_size == member.info.file_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with opened.open(member.info) as stream, open(part, "wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
    part.replace(target)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file() or (target.is_file() and target.stat().st_size == source.stat().st_size):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)


def _find_task_folder(source: Path, task: Task) -> Path:
    candidates = [source / task.folder, *sorted(source.glob(f"*/{task.folder}"))]
    for candidate in candidates:
        if any((candidate / f"{split}.txt").is_file() for split in SPLITS):
            return candidate
    raise UserError(
        f"{source} has no task folder {task.folder}: expected {source / task.folder}/train800val200.txt, "
        f"directly or one folder deeper. Correct --folder, or leave {task.folder} out with --tasks."
    )
