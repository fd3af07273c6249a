"""One process at a time in a folder, or at a file.

The system releases a lock when its process ends, however it ends. On a file system without locks nothing is locked.
"""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mambapeft_vision.utils.atomic import atomic_path, is_plain, planted
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EROFS)  # without locks, or read-only
_SHARED = 0o666  # a second user of the folder has to be able to ask for the lock
_POLL_S = 0.05


class InUseError(UserError):
    """Another process works in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes, also those of other users, out of `folder` (an existing one) during the context.

    The file `.lock` names the holder; it stays afterwards, empty.

    Raises:
        InUseError: at once, naming the holder.
        UserError: where `.lock` is a link or no plain file.
    """
    with _folder_locked(folder), _file_locked(folder):
        yield


@contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """A lock on the folder itself, which stays where `.lock` is deleted; nothing where the system offers none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise _in_use(folder) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _in_use(folder: Path) -> InUseError:
    holder = _holder(folder / LOCK_FILE)
    return InUseError(f"{folder} is in use by {holder}; wait for it or end it, or give this run other paths.outputs")


@contextmanager
def _file_locked(folder: Path) -> Iterator[None]:
    file = folder / LOCK_FILE
    descriptors: list[int] = []

    def sign(descriptor: int) -> None:
        descriptors.append(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    try:
        lock = _acquired(file, 0.0, mode=_SHARED, on_acquired=sign)
    except Timeout:
        raise _in_use(folder) from None
    except PermissionError as error:
        if os.path.lexists(file):
            raise InUseError(
                f"{file} belongs to another user, who may be at work in {folder}; give this run other paths.outputs, "
                "or make the file writable for both"
            ) from error
        lock = None  # nothing can be written here, so nothing can collide
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):  # the folder was deleted, or the disk is read-only by now
                os.ftruncate(descriptors[0], 0)
            lock.release()


@contextmanager
def sole_writer(path: Path) -> Iterator[Path | None]:
    """Lets one process at a time make the file `path`; the others wait for it.

    Yields a temporary path beside it, which is flushed and renamed on success; None if another process has made the
    file meanwhile. The temporary file of a killed process is taken over.
    """
    temporary = _being_written(path)
    lock = _acquired(temporary)
    if lock is None:
        with atomic_path(path) as own:
            yield own
        return
    try:
        if path.exists():  # the lock may be on the finished file itself, which was waited for under its former name
            temporary.unlink(missing_ok=True)
            yield None
            return
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    finally:
        lock.release()


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process at a time change `path`, which need not exist, in an existing folder; the others wait for it."""
    beside = _being_written(path)
    lock = _acquired(beside)
    try:
        yield
    finally:
        if lock is not None:
            beside.unlink(missing_ok=True)
            lock.release()


def remove_abandoned(folder: Path, name: str) -> None:
    """Deletes temporary files of `sole_writer` that killed processes left and nobody holds.

    Args:
        name: a regular expression of the names of the files that were to be made; no other file is touched.
    """
    for temporary in folder.glob(".*.part"):
        if not re.fullmatch(name, temporary.name[1 : -len(".part")]):
            continue
        with suppress(OSError, Timeout, UserError):
            lock = _acquired(temporary, 0.0)
            temporary.unlink()
            if lock is not None:
                lock.release()


def _acquired(
    file: Path, timeout: float = -1.0, *, mode: int = 0o644, on_acquired: Callable[[int], None] | None = None
) -> FileLock | None:
    """The lock at `file`, held; None where the file system has no locks. A timeout below 0 waits for ever."""
    _refuse_unless_plain(file)
    lock = FileLock(
        file,
        timeout,
        mode=mode,
        thread_local=False,
        poll_interval=_POLL_S,
        fallback_to_soft=False,
        preserve_lock_file=True,
        on_acquired=on_acquired,
    )
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
        return None
    return lock


def _refuse_unless_plain(file: Path) -> None:
    """Raises UserError for a link planted under a lock's name, through which another file would be emptied."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if not is_plain(file.lstat()):
            raise planted(file, "a lock file")


def _holder(file: Path) -> str:
    """The holder's note in the lock. The file may come from anybody, so only a short line of it is shown."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return "another process"
    try:
        return plain(os.read(descriptor, 200).decode(errors="replace")) or "another process"
    finally:
        os.close(descriptor)


def _being_written(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
