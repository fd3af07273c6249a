"""One process at a time in a folder, or at a file."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mambapeft_vision.utils.atomic import atomic_path
from mambapeft_vision.utils.errors import UserError

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS, errno.EACCES)  # file systems without locks, or read-only


class InUseError(UserError):
    """Another process works in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder` (an existing one) for the time of the context.

    The system gives the lock back when the process ends, however it ends. A file system without locks is used without.
    Raises: InUseError that names the holder, at once.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            yield
            return
        raise
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            raise InUseError(
                f"{folder} is in use by {holder}; wait for it or end it, or give this run other paths.outputs"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def sole_writer(path: Path) -> Iterator[Path | None]:
    """Lets one process at a time make the file `path`; the others wait for it.

    Gives a temporary path beside it, which is flushed and renamed on success; None where another process has made the
    file meanwhile. What a killed process left is taken over. A file system without locks is used without.
    """
    temporary = _being_written(path)
    descriptor = _waited_for(temporary)
    if descriptor is None:
        with atomic_path(path) as own:
            yield own
        return
    try:
        if path.exists():
            temporary.unlink()
            yield None
            return
        try:
            yield temporary
            os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process at a time change `path`, which need not exist, in an existing folder; the others wait for it.

    A file system without locks is used without.
    """
    beside = _being_written(path)
    descriptor = _waited_for(beside)
    try:
        yield
    finally:
        if descriptor is not None:
            beside.unlink(missing_ok=True)
            os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Deletes what killed processes left in `sole_writer`: temporary files that nobody holds."""
    for temporary in folder.glob(_being_written(Path("*")).name):
        try:
            descriptor = os.open(temporary, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(temporary, descriptor):
                temporary.unlink()
        except OSError:
            continue
        finally:
            os.close(descriptor)


def _being_written(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _waited_for(temporary: Path) -> int | None:
    """A descriptor of the file, locked; None where there are no locks."""
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                temporary.unlink(missing_ok=True)
                return None
            raise
        if _is_still(temporary, descriptor):
            return descriptor
        os.close(descriptor)  # its holder has renamed or deleted it


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        there, ours = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
