"""predictions.npz: the predictions for every test image.

`predicted`, `labels`: class numbers [images]; `top_classes`, `top_probabilities`: the most probable ones [images, k];
`names`: of the images; `class_names`: by number, where there are some. Where images have several labels, `labels` is
[images, classes] of 0 and 1, and `top_*` hold all classes. Files of earlier releases have the first two alone.
"""

from pathlib import Path

import numpy as np

from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.results.record import check_recorded
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_file
from mambapeft_vision.utils.untrusted import MAX_LINES, read_arrays

MOST_CLASSES = 2**31
MOST_PROBABILITIES = 200_000_000  # all images of a file together
MOST_IMAGES = MAX_LINES  # as lists of images have


def read_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes, int64 [images] each, from a run's folder.

    Raises: UserError where the file is missing, damaged or holds anything else.
    """
    file = folder / PREDICTIONS_FILE
    arrays = _read(file)
    if "labels" in arrays and arrays["labels"].ndim == 2:
        raise UserError(f"{file}: its images have several labels each; expected one class for each image")
    found = [arrays[name] for name in ("predicted", "labels") if name in arrays]
    if len(found) != 2 or not all(map(_are_classes, found)) or len(found[0]) != len(found[1]):
        raise UserError(
            f"{file}: expected `predicted` and `labels`, a class number for each test image. Test the run again with "
            f"mambapeft evaluate run=..."
        )
    predicted, labels = (values.astype(np.int64) for values in found)
    return predicted, labels


def read_class_names(folder: Path) -> list[str] | None:
    """The names of the classes, by number; None where the run knew none. Raises: UserError as `read_labels`."""
    names = _read(folder / PREDICTIONS_FILE).get("class_names")
    return None if names is None or names.dtype.kind != "U" or names.ndim != 1 else [str(name) for name in names]


def read_probabilities(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Reads the probabilities of a run's test images, for averaging with other runs.

    Returns: probabilities float32 [images, classes], labels int64 [images], names of the images where they are known.
        Where a task has more classes than are kept, the rest of the probability is spread over the others evenly.
    Raises: UserError as `read_labels`, and for a file of an earlier release, which holds no probabilities.
    """
    _, labels = read_labels(folder)
    file = folder / PREDICTIONS_FILE
    arrays = _read(file)
    classes, shares, names = (arrays.get(name) for name in ("top_classes", "top_probabilities", "names"))
    if classes is None or shares is None:
        raise UserError(f"{file} holds no probabilities, as those of earlier releases; run again with resume=false")
    fits = classes.shape == shares.shape and classes.ndim == 2 and len(classes) == len(labels) and classes.size > 0
    if not fits or classes.dtype.kind not in "iu" or shares.dtype.kind != "f" or not np.isfinite(shares).all():
        raise UserError(f"{file}: top_classes and top_probabilities do not fit each other; run again with resume=false")
    if names is not None and names.shape != labels.shape:
        raise UserError(f"{file}: names has shape {names.shape}; expected one for each image. Run again")
    count = int(max(classes.max(), labels.max())) + 1
    if classes.min() < 0 or count * len(labels) > MOST_PROBABILITIES:
        raise UserError(f"{file}: {count:,} classes of {len(labels):,} images; expected fewer. Run again")
    rest = np.clip(1 - shares.sum(axis=1, keepdims=True), 0, 1) / max(1, count - classes.shape[1])
    full = np.repeat(rest.astype(np.float32), count, axis=1)
    np.put_along_axis(full, classes.astype(np.int64), shares.astype(np.float32), axis=1)
    return full, labels, names


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        arrays = read_arrays(file, kinds="iufU")
        check_recorded(file.parent, file.name, sha256_file(file))
        return arrays
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); expected the folder of a finished run") from error


def _are_classes(values: np.ndarray) -> bool:
    if values.ndim != 1 or values.dtype.kind not in "iu" or not 0 < values.size <= MOST_IMAGES:
        return False
    return 0 <= int(values.min()) <= int(values.max()) < MOST_CLASSES
