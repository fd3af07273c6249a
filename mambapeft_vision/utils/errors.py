"""What ends a command in an orderly way: mistakes that a user can repair, and being told to stop."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in a config, a file or a command.

    The message says what was given, what was expected and what to do. `train.py` and the scripts print
    it without a traceback and leave with exit code 2; from Python it is an ordinary `ValueError`.
    """


class NotFiniteError(UserError):
    """NaN or infinity where no such number may be.

    Args:
        ends_sweep: whether a sweep ends with it too, instead of going on with its other runs.
    """

    def __init__(self, message: str, ends_sweep: bool = True) -> None:
        super().__init__(message)
        self.ends_sweep = ends_sweep


class DiskError(UserError):
    """A file system that is full, read-only, not permitted or broken."""


DISK_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EROFS: "make it writable, or choose another folder",
    errno.EACCES: "make it accessible, or choose another folder",
    errno.EPERM: "make it accessible, or choose another folder",
    errno.ENOTDIR: "a file stands where a folder is expected; move it, or choose another folder",
    errno.EEXIST: "a file stands where a folder is expected; move it, or choose another folder",
    errno.EIO: "the disk or its connection is broken; choose another one",
}


@contextmanager
def disk_errors_of(place: str, choice: str, kept: str) -> Iterator[None]:
    """Turns what a disk says against writing into a DiskError.

    Args:
        place: what was being written, where the system does not name a file.
        choice: how to choose another place, e.g. paths.outputs=DIR.
        kept: what has become of what was there before.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_REMEDIES:
            raise
        raise DiskError(
            f"{error.filename or place}: {error.strerror}; {DISK_REMEDIES[error.errno]} ({choice}). {kept}"
        ) from error


class SweepEnded(BaseException):
    """A run ended in a way that its sweep is to end with. No `except Exception` of a launcher stops it."""


class Preempted(BaseException):
    """The process was told to end (SIGTERM) and has saved its state. No `except Exception` stops it."""
