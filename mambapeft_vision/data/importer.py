"""Labelled images of any origin: one npz file, or a tree with a folder for each class.

npz: `blob` (uint8, encoded images end to end: PNG, JPEG, WebP), `offsets` (image i is
`blob[offsets[i]:offsets[i + 1]]`), `labels`, `class_names`, and optionally `split` (a word for each image).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambapeft_vision.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_KEYS = ("blob", "offsets", "labels", "class_names")


@dataclass(frozen=True)
class LabelledImages:
    """Encoded images with their labels.

    source: the file or folder, for messages; labels: int64 [n]; splits: a word for each image, or None;
    class_names: by label; read: from an image's number to its file content.
    """

    source: Path
    labels: np.ndarray
    splits: np.ndarray | None
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.labels)


def read_labelled(path: Path | str) -> LabelledImages:
    """Opens an npz file or a class-per-folder tree. Raises UserError where it is neither."""
    path = Path(path).expanduser()
    if path.is_dir():
        return read_tree(path)
    if path.suffix == ".npz" and path.is_file():
        return read_npz(path)
    raise UserError(
        f"{path} is {'no .npz file' if path.is_file() else 'missing'}: expected an npz file "
        f"({', '.join(_KEYS)}), or a folder with one folder of images for each class. Correct the path."
    )


def read_npz(file: Path) -> LabelledImages:
    """Reads and checks an npz file. Raises UserError saying what is wrong with it."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            content = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}: {error}): expected a complete npz file of plain "
            "arrays. Get or write it again."
        ) from error
    problem = _npz_problem(content)
    if problem:
        raise UserError(f"{file}: {problem}. The header of mambapeft_vision/data/importer.py describes the format.")
    blob, offsets = content["blob"], content["offsets"]
    return LabelledImages(
        file,
        content["labels"].astype(np.int64),
        content.get("split"),
        tuple(str(name) for name in content["class_names"]),
        lambda index: blob[offsets[index] : offsets[index + 1]].tobytes(),
    )


def read_tree(folder: Path) -> LabelledImages:
    """Reads `folder/<class>/**/<image>`: classes in the order of their names, images in the order of their paths."""
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    files = [
        sorted(file for file in child.rglob("*") if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES)
        for child in classes
    ]
    if len(classes) < 2:
        raise UserError(
            f"{folder} has {len(classes)} sub-folders: expected one folder of images for each class, at least two."
        )
    empty = [child.name for child, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise UserError(
            f"{folder} has no image in {empty[:5]}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))} "
            "in the folder of every class. Remove the folders that are no classes."
        )
    paths = [file for found in files for file in found]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    names = tuple(child.name for child in classes)
    return LabelledImages(folder, labels, None, names, lambda index: paths[index].read_bytes())


def _npz_problem(content: dict[str, np.ndarray]) -> str | None:
    """The first thing that is wrong with the arrays of an npz file."""
    missing = [key for key in _KEYS if key not in content]
    if missing:
        return f"lacks {', '.join(missing)}; it has {', '.join(content) or 'nothing'}"
    blob, offsets, labels = content["blob"], content["offsets"], content["labels"]
    if blob.dtype != np.uint8 or blob.ndim != 1:
        return f"blob is {blob.dtype} {blob.shape}, expected uint8 [bytes]"
    if not (np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1 and len(labels)):
        return f"labels are {labels.dtype} {labels.shape}, expected whole numbers [images]"
    if not (np.issubdtype(offsets.dtype, np.integer) and offsets.shape == (len(labels) + 1,)):
        return f"offsets are {offsets.dtype} {offsets.shape}, expected {len(labels) + 1} whole numbers (images + 1)"
    if offsets[0] < 0 or offsets[-1] > len(blob) or (np.diff(offsets) <= 0).any():
        return f"offsets do not rise from 0 to the blob's {len(blob):,} bytes"
    classes = len(content["class_names"])
    if labels.min() < 0 or labels.max() >= classes:
        return f"labels run from {labels.min()} to {labels.max()}, expected 0 to {classes - 1} ({classes} class names)"
    if "split" in content and content["split"].shape != labels.shape:
        return f"split has shape {content['split'].shape}, expected one word for each of {len(labels)} images"
    return None
