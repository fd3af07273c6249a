"""Files that are either whole or absent, whenever the process dies."""

import errno
import glob
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain

# A name that nobody can foresee: a link planted under a foreseeable one would have another file overwritten.
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_CREATE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
_APPEND = os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_WRONLY | os.O_CLOEXEC
_DAY_S = 86_400.0


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives the path of an empty temporary file beside `path`; on success it is flushed and renamed over `path`.

    A link at `path` is replaced, not followed.
    """
    path = Path(path)
    temporary = temporary_path(path)
    with errors_name(path, temporary):
        os.close(os.open(temporary, _CREATE, 0o666))
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            with suppress(OSError):  # only the first error counts
                temporary.unlink(missing_ok=True)


@contextmanager
def errors_name(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors of the system name the file or folder that was to be written: those of a write name none.

    temporary: where it is written; errors name it, or what is in it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        elif error.errno is not None and temporary is not None:
            error.filename = str(error.filename).replace(str(temporary), str(path))
        raise


def _sync_folder(folder: Path) -> None:
    """A file that was renamed is found after a loss of power only once its folder is on the disk."""
    with suppress(OSError):  # some network drives do not offer this
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a new folder beside `folder`, which does not exist; on success it is renamed to `folder`.

    Raises:
        OSError: where `folder` has come into being meanwhile and holds something.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_old_folders(folder)
    temporary = temporary_path(folder)
    with errors_name(folder, temporary):
        temporary.mkdir()
        try:
            yield temporary
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder for what the block writes, so that a folder that cannot be made is found before the work.

    Folders made here in which nothing was written are removed if the block fails.

    Raises: UserError where a file stands in the folder's place.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{plain(folder)} is a file; expected a folder to write to. Choose another one")
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it holds something
            for one in made:
                one.rmdir()
        raise


def open_log(file: Path) -> int:
    """Opens a file that lines are appended to → its descriptor; makes it where it is not there.

    Raises:
        UserError: for a link (also a hard one), a pipe or a device that somebody has put there: the lines would go
            into another file, or wait for a reader.
        OSError: for an error of the disk.
    """
    refused = planted(file, "a log")
    if file.is_symlink():
        raise refused
    try:
        descriptor = os.open(file, _APPEND, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link since then, or a pipe without a reader
            raise refused from None
        raise
    if not is_plain(os.fstat(descriptor)):
        os.close(descriptor)
        raise refused
    return descriptor


def is_plain(status: os.stat_result) -> bool:
    """Whether a status is that of a file with one name: no hard link, pipe, device or folder (`lstat`: no link)."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def planted(file: Path, expected: str) -> UserError:
    """The error for anything else in the place of `expected`, a file of this project."""
    return UserError(
        f"{plain(file)} is a link or no plain file; expected {expected} that this project made. Delete it, and ask who "
        "put it there"
    )


def temporary_path(path: Path) -> Path:
    """A path beside `path` that nobody can foresee, in the form that `remove_leftovers` knows."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Deletes temporary files of killed processes. No other process may be at work in the folder."""
    for file in folder.glob(".*.tmp"):
        with suppress(OSError):
            if _LEFTOVER.fullmatch(file.name) and stat.S_ISREG(file.lstat().st_mode):
                file.unlink()


def _remove_old_folders(folder: Path) -> None:
    """Deletes temporary versions of `folder` that processes left more than a day ago."""
    for found in folder.parent.glob(f".{glob.escape(folder.name[:200])}.*.tmp"):
        with suppress(OSError):
            status = found.lstat()
            old = time.time() - status.st_mtime > _DAY_S
            if old and _LEFTOVER.fullmatch(found.name) and stat.S_ISDIR(status.st_mode):
                shutil.rmtree(found)


def allocate(descriptor: int, size: int) -> None:
    """Has the disk set `size` bytes aside for an open file. Raises OSError if they are not there."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
            raise
        os.ftruncate(descriptor, size)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file that is whole or absent, also if the process dies."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict JSON (NaN and infinity are refused), readable and with keys in their given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
