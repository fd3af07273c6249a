"""The demo task: scikit-learn's digits, 1,797 real images of handwritten digits, laid out like a VTAB task.

8x8 pixels in 17 greys, from the test part of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin,
C. Kaynak; CC BY 4.0). They come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from mambapeft_vision.data.manifest import read_record, write_record
from mambapeft_vision.data.module import TaskDataModule
from mambapeft_vision.data.prepare.verify import verify_task
from mambapeft_vision.data.tasks import DIGITS
from mambapeft_vision.utils.errors import UserError

SPLIT_SEED = 0


class DemoDataModule(TaskDataModule):
    """The digits, laid out where `folder` does not exist."""

    def lay_out(self) -> None:
        lay_out_digits(self.folder)

    def remedy(self) -> str:
        return f"Delete {self.folder} and start again: it is laid out anew by itself."


def lay_out_digits(folder: Path) -> None:
    """Writes images, list files and manifest entry of the digits, unless they are there.

    The folder appears complete or not at all, whenever the process is killed and however many run at once.
    """
    if not folder.exists():
        temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process that had the same number
        temporary.mkdir(parents=True)
        try:
            _write_digits(temporary)
            _move_into_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if read_record(folder.parent, folder.name) is None:
        report = verify_task(DIGITS, folder)
        if report.record is None:
            raise UserError(f"{report.problems[0]} Delete {folder} and start again: it is laid out anew by itself.")
        write_record(folder.parent, folder.name, report.record)


def stratified_splits(labels: np.ndarray, sizes: list[int], seed: int) -> list[np.ndarray]:
    """Splits indices at random into parts of the given sizes, each class in proportion (within one image).

    labels: int [n]; sizes add up to n. Returns one int64 array of indices for each size.
    """
    # RandomState's stream is frozen for good, Generator's is not.
    order = np.random.RandomState(seed).permutation(len(labels))
    # Each image's place among the shuffled images of its own class, as a share of it: (i + 1/2) / class size.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    # Sorted by place the classes are evenly interleaved, so any stretch of the sequence is stratified.
    interleaved = order[np.argsort(place[order], kind="stable")]
    return np.split(interleaved, np.cumsum(sizes)[:-1])


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits  # only needed here, once, and slow to import

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # greys 0 to 16 → 0 to 255
    train, val, test = stratified_splits(labels, [DIGITS.num_train, DIGITS.num_val, DIGITS.num_test], SPLIT_SEED)
    splits = {"train800": train, "val200": val, "train800val200": np.concatenate([train, val]), "test": test}
    for split, indices in splits.items():
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for number, index in enumerate(indices):
            path = f"images/{split}/{number:06d}.png"
            # Uncompressed, so that the bytes, and with them the manifest, do not depend on the zlib in use.
            Image.fromarray(pixels[index]).save(folder / path, compress_level=0)
            lines.append(f"{path} {labels[index]}\n")
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")


def _move_into_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was quicker; its folder is the same
            raise
