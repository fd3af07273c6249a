"""predictions.npz: the predicted and true class of every test image."""

from pathlib import Path

import numpy as np

from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.untrusted import read_arrays

MOST_CLASSES = 2**31


def read_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes, int64 [images] each, from a run's folder.

    Raises: UserError where the file is missing, damaged or holds anything else.
    """
    file = folder / PREDICTIONS_FILE
    try:
        arrays = read_arrays(file, kinds="iuf")  # the file may hold more than classes
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); expected the folder of a finished run") from error
    found = [arrays[name] for name in ("predicted", "labels") if name in arrays]
    if len(found) != 2 or not all(map(_are_classes, found)) or len(found[0]) != len(found[1]):
        raise UserError(
            f"{file}: expected `predicted` and `labels`, a class number for each test image. Test the run again with "
            f"evaluate.py"
        )
    predicted, labels = (values.astype(np.int64) for values in found)
    return predicted, labels


def _are_classes(values: np.ndarray) -> bool:
    if values.ndim != 1 or values.dtype.kind not in "iu" or not values.size:
        return False
    return 0 <= int(values.min()) <= int(values.max()) < MOST_CLASSES
