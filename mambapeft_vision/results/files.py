"""Reading what a run left: the folder may have come from anybody."""

import os
import stat
from pathlib import Path

from mambapeft_vision.utils.errors import UserError

MOST_BYTES = 64 * 2**20  # of one file of a run; a bundle of 50,000 runs has 12 MB


def read_bytes(file: Path, expected: str, most: int = MOST_BYTES) -> bytes:
    """The content of a plain file.

    Args:
        expected: what should be there, for the message.
        most: bytes; a longer file is refused after so many were read.

    Raises:
        UserError: for a file that is missing, no plain file (a link, device, pipe or folder) or too long.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody who writes into it.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        reason = "a link" if file.is_symlink() else error.strerror
        raise UserError(f"{file} cannot be read ({reason}); expected {expected}") from error
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{file} cannot be read (no plain file); expected {expected}")
        content = stream.read(most + 1)
    if len(content) > most:
        raise UserError(f"{file} has more than {most:,} bytes; expected {expected}")
    return content


def read_text(file: Path, expected: str, most: int = MOST_BYTES) -> str:
    """The content of a plain file in UTF-8. Raises: UserError as `read_bytes`."""
    try:
        return read_bytes(file, expected, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8; expected {expected}") from error
