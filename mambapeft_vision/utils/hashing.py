"""Fingerprints of files."""

import hashlib
from pathlib import Path

from mambapeft_vision.utils.progress import ProgressCallback, ProgressMeter

_BLOCK = 1 << 20


def sha256_file(file: Path | str, progress: ProgressCallback | None = None) -> str:
    """sha256 of a file's content, in hex.

    Args:
        progress: called with the bytes read.
    """
    file = Path(file)
    meter = ProgressMeter(file.stat().st_size, progress)
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            meter.advance(len(block))
    return digest.hexdigest()
