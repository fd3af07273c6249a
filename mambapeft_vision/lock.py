"""One process at a time in a folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mambapeft_vision.errors import UserError

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
