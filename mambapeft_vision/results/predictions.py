"""predictions.npz: the predicted and true class of every test image."""

import io
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mambapeft_vision.results.files import read_bytes
from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain

MOST_IMAGES = 50_000_000
_NAMES = ("predicted", "labels")
_UNREADABLE = (
    KeyError, ValueError, TypeError, EOFError, OSError, MemoryError, OverflowError, RecursionError, SyntaxError,
    NotImplementedError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes, int64 [images] each, from a run's folder.

    Raises: UserError where the file is missing, damaged or holds anything else.
    """
    file = folder / PREDICTIONS_FILE
    content = read_bytes(file, "the folder of a finished run", most=2**30)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = max(archive.getinfo(f"{name}.npy").file_size for name in _NAMES)
        if size > 8 * MOST_IMAGES + 10_000:
            raise ValueError(f"an array of {size:,} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            predicted, labels = (_classes(arrays[name], size) for name in _NAMES)
    except _UNREADABLE as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}: {plain(error)}); expected the classes of test images. "
            f"Test the run again with evaluate.py"
        ) from error
    if len(predicted) != len(labels) or not len(labels):
        raise UserError(f"{file}: {len(predicted):,} predictions and {len(labels):,} labels; expected as many, above 0")
    return predicted, labels


def _classes(values: object, most_bytes: int) -> np.ndarray:
    if not isinstance(values, np.ndarray):  # NumPy gives what has no header as it is
        raise ValueError("no array")
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.nbytes > most_bytes:
        raise ValueError(f"an array of {values.dtype} {values.shape}")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**31:
        raise ValueError("class numbers below 0 or above 2^31")
    return values.astype(np.int64)
