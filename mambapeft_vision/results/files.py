"""Reading the files of a run's folder, which may have come from anybody."""

from pathlib import Path

from mambapeft_vision.utils import untrusted
from mambapeft_vision.utils.errors import UserError

MOST_BYTES = 64 * 2**20  # largest file of a run; a bundle of 50,000 runs has 12 MB


def read_bytes(file: Path, expected: str, most: int = MOST_BYTES) -> bytes:
    """The content of a plain file.

    Args:
        expected: names the expected file in messages.
        most: bytes; a longer file is refused.

    Raises:
        UserError: for a file that is missing, no plain file (a link, device, pipe or folder) or too long.
    """
    try:
        return untrusted.read_bytes(file, max_bytes=most)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); expected {expected}") from error


def read_text(file: Path, expected: str, most: int = MOST_BYTES) -> str:
    """The content of a plain file in UTF-8. Raises: UserError as `read_bytes`."""
    try:
        return untrusted.read_text(file, max_bytes=most)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); expected {expected}") from error
