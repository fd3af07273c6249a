"""The demo task: scikit-learn's digits, 1,797 real images of handwritten digits, laid out like a VTAB task.

8x8 pixels in 17 greys, from the test part of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin,
C. Kaynak; CC BY 4.0). They come with scikit-learn, so nothing is downloaded.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from mambapeft_vision.data.manifest import read_entry, write_entry
from mambapeft_vision.data.module import TaskDataModule
from mambapeft_vision.data.png import encode_png
from mambapeft_vision.data.prepare.verify import verify_task
from mambapeft_vision.data.splits import stratified_splits
from mambapeft_vision.data.tasks import DIGITS
from mambapeft_vision.utils.atomic import atomic_folder
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
        try:
            with atomic_folder(folder) as temporary:
                write_digits(temporary)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker; its folder is the same
                raise
    if read_entry(folder.parent, folder.name) is None:
        report = verify_task(DIGITS, folder)
        if report.entry is None:
            raise UserError(f"{report.problems[0]} Delete {folder} and start again: it is laid out anew by itself.")
        write_entry(folder.parent, folder.name, report.entry, report.states)


def write_digits(folder: Path) -> None:
    """Writes the images and lists of the task into an empty folder."""
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
            (folder / path).write_bytes(encode_png(Image.fromarray(pixels[index])))
            lines.append(f"{path} {labels[index]}\n")
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
