"""Labelled images of any origin, read and laid out as a task: one npz file, or a tree with a folder for each class.

npz: `blob` (uint8, encoded images end to end: PNG, JPEG, WebP), `offsets` (image i is
`blob[offsets[i]:offsets[i + 1]]`), `labels`, `class_names`, and optionally `split` (a word for each image).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mambapeft_vision.data.manifest import write_entry
from mambapeft_vision.data.own.files import (
    IMAGE_SUFFIXES,
    NAMED,
    known_suffix,
    suffix_of,
    visible_files,
    visible_folders,
)
from mambapeft_vision.data.own.source import parts_of, too_few_classes
from mambapeft_vision.data.prepare.verify import TaskReport, verify_task
from mambapeft_vision.data.preprocessing import MAX_IMAGE_BYTES
from mambapeft_vision.data.splits import stratified_splits
from mambapeft_vision.data.tasks import GROUPS, Task
from mambapeft_vision.utils.atomic import atomic_folder
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import check_name, user_path
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import read_arrays, read_bytes

MAX_BYTES = 32_000_000_000  # bytes of an npz file's arrays, which are read into memory
_KEYS = ("blob", "offsets", "labels", "class_names")


@dataclass(frozen=True)
class LabelledImages:
    """Encoded images with their labels.

    Args:
        source: the file or folder, for messages.
        labels: int64 [n].
        splits: a word for each image, or None.
        class_names: by label.
        read: from an image's number to its file content.
        name: from an image's number to what a message calls it.
        notes: files that were left out and why, one sentence each.
    """

    source: Path
    labels: np.ndarray
    splits: np.ndarray | None
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]
    name: Callable[[int], str]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def read_labelled(path: Path | str) -> LabelledImages:
    """Opens an npz file or a class-per-folder tree. Raises UserError where it is neither."""
    path = user_path(path)
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
        content = read_arrays(file, max_bytes=MAX_BYTES, follow_links=True)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). Get or write it again.") from error
    problem = _npz_problem(content)
    if problem:
        raise UserError(
            f"{file}: {problem}. The header of mambapeft_vision/data/prepare/importer.py describes the format."
        )
    blob, offsets = content["blob"], content["offsets"].astype(np.int64)
    return LabelledImages(
        file,
        content["labels"].astype(np.int64),
        content.get("split"),
        tuple(str(name) for name in content["class_names"]),
        lambda index: blob[offsets[index] : offsets[index + 1]].tobytes(),
        lambda index: f"image {index} of {file}",
    )


def read_tree(folder: Path) -> LabelledImages:
    """Reads `folder/<class>/**/<image>`: classes in the order of their names, images in the order of their paths.

    A tree that is split already, `folder/{train,val,test}/<class>/**/<image>`, keeps its splits. Hidden files and
    folders are skipped at any depth. Images are recognised by their content; other files are noted.
    """
    parts = parts_of(folder)
    classes = sorted({child.name for part in parts for child in visible_folders(part)})
    if len(classes) < 2:
        raise too_few_classes(folder, len(classes), "Sort the images into folders")
    paths: list[Path] = []
    labels: list[int] = []
    words: list[str | None] = []
    others: list[Path] = []
    for part, word in parts.items():
        for label, name in enumerate(classes):
            for file in visible_files(part / name):
                if suffix_of(file) is None:
                    others.append(file)
                else:
                    paths.append(file)
                    labels.append(label)
                    words.append(word)
    empty = [name for label, name in enumerate(classes) if label not in set(labels)]
    if empty:
        endings = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(
            f"{folder} has no image in {shown(empty[:NAMED])}: expected files ending in {endings}, or of such "
            "content, in the folder of every class. Remove the folders that are no classes."
        )
    return LabelledImages(
        folder,
        np.array(labels, dtype=np.int64),
        None if None in words else np.array(words),
        tuple(classes),
        lambda index: read_bytes(paths[index], max_bytes=MAX_IMAGE_BYTES, follow_links=True),
        lambda index: str(paths[index]),
        (_note("is no image and was left out", "are no images and were left out", others),) if others else (),
    )


def _note(one: str, many: str, files: Sequence[Path]) -> str:
    named = ", ".join(plain(file) for file in files[:NAMED])
    more = f" and {len(files) - NAMED:,} more" if len(files) > NAMED else ""
    return f"{named}{more} {one if len(files) == 1 else many}."


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
    names = content["class_names"]
    if names.dtype.kind not in "US" or names.ndim != 1:
        return f"class_names are {names.dtype} {names.shape}, expected text [classes]"
    classes = len(names)
    if labels.min() < 0 or labels.max() >= classes:
        return f"labels run from {labels.min()} to {labels.max()}, expected 0 to {classes - 1} ({classes} class names)"
    if "split" in content and content["split"].shape != labels.shape:
        return f"split has shape {content['split'].shape}, expected one word for each of {len(labels)} images"
    return None


# Laying out a task


class EncodedImage(NamedTuple):
    """An image before it is laid out. name: its name in messages; None: it was drawn here."""

    content: bytes
    label: int
    name: str | None = None


@dataclass(frozen=True)
class EncodedSplits:
    """A task's images before they are laid out, by split."""

    train800: list[EncodedImage]
    val200: list[EncodedImage]
    test: list[EncodedImage]

    def by_name(self) -> dict[str, list[EncodedImage]]:
        return {
            "train800": self.train800,
            "val200": self.val200,
            "train800val200": self.train800 + self.val200,
            "test": self.test,
        }


def split_labelled(labelled: LabelledImages, *, max_test: int, seed: int) -> EncodedSplits:
    """Takes the splits `train800`, `val200`, `test` as they are marked; else draws them, in proportion to the classes.

    Without such marks, images marked `test` (or `val` where none is; or, without any mark, all that are left) are for
    testing, at most `max_test` of them. Raises UserError when there are too few.
    """
    if labelled.splits is not None and {"train800", "val200", "test"} <= set(labelled.splits.tolist()):
        chosen = [np.flatnonzero(labelled.splits == split) for split in ("train800", "val200", "test")]
    else:
        chosen = _draw_splits(labelled, max_test, seed)

    def encoded(indices: np.ndarray) -> list[EncodedImage]:
        return [EncodedImage(labelled.read(i), int(labelled.labels[i]), labelled.name(i)) for i in indices]

    return EncodedSplits(*map(encoded, chosen))


def lay_out_task(task: Task, folder: Path, splits: EncodedSplits) -> TaskReport:
    """Writes a task's images and list files, checks all of it, and moves it to `folder`, with its manifest entry.

    The folder appears complete and checked or not at all. Raises UserError where it exists, and for images that
    cannot be decoded.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: expected a new folder. Delete it, or give another --name or --out.")
    with atomic_folder(folder) as temporary:
        names = _write_splits(temporary, splits)
        report = verify_task(task, temporary)
        if report.entry is None:
            more = f" ({len(report.problems) - 1:,} more problems.)" if len(report.problems) > 1 else ""
            problem = _with_own_names(report.problems[0], temporary, folder, names)
            raise UserError(f"{task.name} cannot be laid out: {problem}{more}")
    write_entry(folder.parent, folder.name, report.entry, report.states)
    return report


def import_task(
    path: Path | str, name: str, root: Path, *, group: str = "custom", max_test: int = 2000, seed: int = 0
) -> TaskReport:
    """Lays out an npz file or a class-per-folder tree as the task `mini/<name>` in `root/<name>`. Raises UserError."""
    check_name(name, "--name")
    if group not in GROUPS:
        raise UserError(f"group {group!r}: expected one of {', '.join(GROUPS)}.")
    labelled = read_labelled(path)
    splits = split_labelled(labelled, max_test=max_test, seed=seed)
    task = Task(
        name,
        group,
        len(labelled.class_names),
        num_train=len(splits.train800),
        num_val=len(splits.val200),
        num_test=len(splits.test),
        family="mini",
    )
    report = lay_out_task(task, root / name, splits)
    report.notes.extend(labelled.notes)
    return report


def _with_own_names(problem: str, temporary: Path, folder: Path, names: dict[str, str]) -> str:
    """A problem found in the temporary folder, with the names that the user knows."""
    for path, name in names.items():
        if str(temporary / path) in problem:
            return f"{plain(name)}: {problem.partition(f'{temporary / path}: ')[2]}"
    return problem.replace(str(temporary), str(folder))


def _draw_splits(labelled: LabelledImages, max_test: int, seed: int) -> list[np.ndarray]:
    marked = np.zeros(len(labelled), dtype=bool)
    if labelled.splits is not None:
        words = set(labelled.splits.tolist())
        marked = labelled.splits == ("val" if "val" in words and "test" not in words else "test")
    pool, test = np.flatnonzero(~marked), np.flatnonzero(marked)
    left = len(pool) - 1000
    if left < 0 or (not len(test) and left == 0):
        raise UserError(
            f"{labelled.source} has {len(pool)} images to train on: expected 1,000 (800 + 200), and some more to test. "
            f"Fewer are trained on where they lie: dataset=folder dataset.path=DIR"
        )
    train, val, rest = (pool[part] for part in stratified_splits(labelled.labels[pool], [800, 200, left], seed))
    candidates = test if len(test) else rest
    if len(candidates) > max_test:
        sizes = [max_test, len(candidates) - max_test]
        candidates = candidates[stratified_splits(labelled.labels[candidates], sizes, seed)[0]]
    return [train, val, candidates]


def _write_splits(folder: Path, splits: EncodedSplits) -> dict[str, str]:
    """Writes images and lists; returns what a message calls the images, by path."""
    names = {}
    for split, images in splits.by_name().items():
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for number, image in enumerate(images):
            path = f"images/{split}/{number:06d}{known_suffix(image.content) or '.img'}"
            (folder / path).write_bytes(image.content)
            lines.append(f"{path} {image.label}\n")
            if image.name is not None:
                names[path] = image.name
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return names
