"""Labelled images of any origin, read and laid out as a task: one npz file, or a tree with a folder for each class.

npz: `blob` (uint8, encoded images end to end: PNG, JPEG, WebP), `offsets` (image i is
`blob[offsets[i]:offsets[i + 1]]`), `labels`, `class_names`, and optionally `split` (a word for each image).
"""

from __future__ import annotations

import os
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambapeft_vision.data.manifest import write_record
from mambapeft_vision.data.prepare.verify import TaskReport, verify_task
from mambapeft_vision.data.tasks import GROUPS, Task
from mambapeft_vision.utils.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
MAX_BYTES = 32_000_000_000  # of an npz file's arrays, which are read into memory
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


# What NumPy's and zipfile's readers raise on damaged files; an array's header is a literal of Python, read as such.
_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    MemoryError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
    tokenize.TokenError,
)


def read_npz(file: Path) -> LabelledImages:
    """Reads and checks an npz file. Raises UserError saying what is wrong with it."""
    try:
        with zipfile.ZipFile(file) as unread:
            unpacked = sum(info.file_size for info in unread.infolist())
        if unpacked > MAX_BYTES:
            raise UserError(f"{file} unpacks to {unpacked:,} bytes: expected at most {MAX_BYTES:,}. Split it.")
        with np.load(file, allow_pickle=False) as archive:
            content = {key: archive[key] for key in archive.files}
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}: {error}): expected a complete npz file of plain "
            "arrays. Get or write it again."
        ) from error
    problem = _npz_problem(content)
    if problem:
        raise UserError(
            f"{file}: {problem}. The header of mambapeft_vision/data/prepare/importer.py describes the format."
        )
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


# Laying out a task


@dataclass(frozen=True)
class EncodedSplits:
    """A task's images before they are laid out: (content, label) pairs of each split."""

    train800: list[tuple[bytes, int]]
    val200: list[tuple[bytes, int]]
    test: list[tuple[bytes, int]]


def split_labelled(labelled: LabelledImages, *, max_test: int, seed: int) -> EncodedSplits:
    """Takes the splits `train800`, `val200`, `test` as they are marked; else draws them, in proportion to the classes.

    Without such marks, images marked `test` (or, without any mark, all that are left) are for testing, at most
    `max_test` of them. Raises UserError when there are too few.
    """
    if labelled.splits is not None and {"train800", "val200", "test"} <= set(labelled.splits.tolist()):
        chosen = [np.flatnonzero(labelled.splits == split) for split in ("train800", "val200", "test")]
    else:
        chosen = _draw_splits(labelled, max_test, seed)
    return EncodedSplits(*([(labelled.read(i), int(labelled.labels[i])) for i in indices] for indices in chosen))


def lay_out_task(task: Task, folder: Path, splits: EncodedSplits) -> TaskReport:
    """Writes a task's images and list files, checks all of it, and moves it to `folder`, with its manifest entry.

    The folder appears complete and checked or not at all. Raises UserError where it exists, and for images that
    cannot be decoded.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: expected a new folder. Delete it, or give another --name or --out.")
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process that had the same number
    try:
        _write_splits(temporary, splits)
        report = verify_task(task, temporary)
        if report.record is None:
            more = f" ({len(report.problems) - 1:,} more problems.)" if len(report.problems) > 1 else ""
            raise UserError(f"{task.name} cannot be laid out: {report.problems[0]}{more}")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_record(folder.parent, folder.name, report.record)
    return report


def import_task(
    path: Path | str, name: str, root: Path, *, group: str = "custom", max_test: int = 2000, seed: int = 0
) -> TaskReport:
    """Lays out an npz file or a class-per-folder tree as the task `mini/<name>` in `root/<name>`. Raises UserError."""
    if group not in GROUPS:
        raise UserError(f"group {group!r}: expected one of {', '.join(GROUPS)}.")
    labelled = read_labelled(path)
    splits = split_labelled(labelled, max_test=max_test, seed=seed)
    sizes = {"num_train": len(splits.train800), "num_val": len(splits.val200), "num_test": len(splits.test)}
    task = Task(name, group, len(labelled.class_names), family="mini", **sizes)
    return lay_out_task(task, root / name, splits)


def _draw_splits(labelled: LabelledImages, max_test: int, seed: int) -> list[np.ndarray]:
    from mambapeft_vision.data.generated.digits import (
        stratified_splits,  # takes Lightning along, which is slow to import
    )

    marked = np.zeros(len(labelled), dtype=bool)
    if labelled.splits is not None:
        marked = labelled.splits == "test"
    pool, test = np.flatnonzero(~marked), np.flatnonzero(marked)
    left = len(pool) - 1000
    if left < 0 or (not len(test) and left == 0):
        raise UserError(
            f"{labelled.source} has {len(pool)} images to train on: expected 1,000 (800 + 200), and some more to test."
        )
    train, val, rest = (pool[part] for part in stratified_splits(labelled.labels[pool], [800, 200, left], seed))
    candidates = test if len(test) else rest
    if len(candidates) > max_test:
        sizes = [max_test, len(candidates) - max_test]
        candidates = candidates[stratified_splits(labelled.labels[candidates], sizes, seed)[0]]
    return [train, val, candidates]


def _write_splits(folder: Path, splits: EncodedSplits) -> None:
    by_split = {
        "train800": splits.train800,
        "val200": splits.val200,
        "train800val200": splits.train800 + splits.val200,
        "test": splits.test,
    }
    for split, images in by_split.items():
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for number, (content, label) in enumerate(images):
            path = f"images/{split}/{number:06d}{_suffix(content)}"
            (folder / path).write_bytes(content)
            lines.append(f"{path} {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")


def _suffix(content: bytes) -> str:
    """The usual ending of a file of this content; what no known format begins like is left to the check to find."""
    return next((suffix for start, suffix in _SIGNATURES.items() if content.startswith(start)), ".img")
