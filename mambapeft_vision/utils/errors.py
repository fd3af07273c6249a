"""Exceptions that end a command in an orderly way: mistakes that a user can repair, and requests to stop."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code after Ctrl-C, as shells report it


class UserError(ValueError):
    """A mistake in a config, a file or a command.

    The message says what was given, what was expected and what to do. Commands print it without a traceback and exit
    with code 2. In Python it is an ordinary `ValueError`.

    Example:
        >>> try:
        ...     create_backbone("vim_smal")
        ... except UserError as error:
        ...     print(str(error)[:35])
        backbone.name='vim_smal' is unknown
    """


class NotFiniteError(UserError):
    """NaN or infinity in an input, a loss, a gradient, a weight or a result.

    Args:
        ends_sweep: whether the error also ends a sweep, instead of only this run.
    """

    def __init__(self, message: str, ends_sweep: bool = True) -> None:
        super().__init__(message)
        self.ends_sweep = ends_sweep


class DiskError(UserError):
    """A file system that is full, read-only, not permitted or broken."""


_SPACE = "free some space, or choose another disk"
_ACCESS = "make it accessible, or choose another folder"
_IN_THE_WAY = "a file stands where a folder is expected; move it, or choose another folder"
_CONNECTION = "the disk or its connection is broken; connect it again, or choose another one"
_NAME = "choose a shorter name or path"
_BUSY = "another program uses it; end that one, or choose another folder"
_LIMIT = "this process or machine has too many files open; end other programs, or raise the limit (ulimit -n)"

# Errors of files and disks → what the user can do. The whole list of such errors: local disks, quotas,
# network drives (NFS, SMB, FUSE), limits of names and of open files, links that go round.
DISK_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EFBIG: "the disk or a limit (ulimit -f) allows no file of this size; choose another disk, or raise the limit",
    errno.EROFS: "make it writable, or choose another folder",
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: "a folder stands where a file is expected; move it, or choose another folder",
    errno.ENOTEMPTY: "a folder that is not empty is in the way; move it, or choose another folder",
    errno.ELOOP: "its links go round in a circle; correct them, or choose another folder",
    errno.ENAMETOOLONG: _NAME,
    errno.EMLINK: "the folder can hold no more; choose another one",
    errno.EXDEV: "its parts lie on different disks; choose one folder for all",
    errno.EIO: "the disk or its connection is broken; choose another one",
    errno.ENXIO: _CONNECTION,
    errno.ENODEV: _CONNECTION,
    errno.ESTALE: _CONNECTION,
    errno.ENOTCONN: _CONNECTION,
    errno.ECONNABORTED: _CONNECTION,
    errno.ECONNRESET: _CONNECTION,
    errno.ECONNREFUSED: _CONNECTION,
    errno.ETIMEDOUT: _CONNECTION,
    errno.EHOSTDOWN: _CONNECTION,
    errno.EHOSTUNREACH: _CONNECTION,
    errno.ENETDOWN: _CONNECTION,
    errno.ENETUNREACH: _CONNECTION,
    errno.ESHUTDOWN: _CONNECTION,
    errno.EBUSY: _BUSY,
    errno.ETXTBSY: _BUSY,
    errno.EMFILE: _LIMIT,
    errno.ENFILE: _LIMIT,
    errno.ENOLCK: "the disk offers no more locks; choose another folder",
    **{getattr(errno, name): _CONNECTION for name in ("EREMOTEIO", "EUCLEAN", "ENOMEDIUM") if hasattr(errno, name)},
}


# What can be wrong with a disk where the system names no file, and never with a network.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


@contextmanager
def disk_errors_of(place: str, choice: str, kept: str) -> Iterator[None]:
    """Turns errors of the disk into a DiskError.

    Args:
        place: names the output in the message if the system names no file.
        choice: how to choose another place, e.g. paths.outputs=DIR.
        kept: a sentence that says whether earlier work is safe.

    Raises:
        DiskError: for an error of `DISK_REMEDIES`.
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
    """Raised when a failed run must also stop its sweep. No `except Exception` of a launcher stops it."""


class Preempted(BaseException):
    """Raised after SIGTERM, when the state is saved. No `except Exception` stops it."""
