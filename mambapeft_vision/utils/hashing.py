"""Fingerprints of files and of plain data."""

import hashlib
import json
from pathlib import Path
from typing import Any

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


def sha256_json(value: Any) -> str:
    """sha256 of plain data as JSON, in hex; the order of keys does not count.

    Fingerprints of published runs are made so: another way to write the JSON would change them.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
