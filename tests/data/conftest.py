"""Small task folders in the layout of VTAB-1K, made on the spot."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambapeft_vision.data import Preprocessing
from mambapeft_vision.data.tasks import Task

# 5 + 2 training images do not fill batches of 3, and 4 test images do not fill batches of 3 either.
TOY = Task("toy", "natural", num_classes=3, num_test=4, num_train=5, num_val=2)


@pytest.fixture
def toy() -> Task:
    return TOY


@pytest.fixture
def preprocessing() -> Preprocessing:
    return Preprocessing((8, 6), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def lay_out() -> Callable[[Path], Path]:
    """Writes the images and lists of a task below `root` and returns the task's folder."""

    def write(root: Path, task: Task = TOY) -> Path:
        random = np.random.default_rng(sum(task.folder.encode()))
        folder = root / task.folder
        for split in ("train800", "val200", "train800val200", "test"):
            (folder / "images" / split).mkdir(parents=True)
            lines = []
            numbers = {"train800val200": [*range(task.num_train), *range(task.num_val)]}
            for number, label in enumerate(numbers.get(split, range(task.valid_counts(split)[0]))):
                path = f"images/{split}/{number:06d}.jpg"
                pixels = random.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / path, quality=75)
                lines.append(f"{path} {label % task.num_classes}\n")
            (folder / f"{split}.txt").write_text("".join(lines))
        return folder

    return write


@pytest.fixture
def toy_folder(tmp_path: Path, lay_out: Callable[[Path], Path]) -> Path:
    """The toy task, laid out."""
    return lay_out(tmp_path)


@pytest.fixture
def zip_folder() -> Callable[..., Path]:
    """Adds a folder under its own name, below `prefix`, to a zip file and returns the file."""

    def write(folder: Path, file: Path, prefix: str = "") -> Path:
        with zipfile.ZipFile(file, "a") as opened:
            for path in sorted(folder.rglob("*")):
                opened.write(path, f"{prefix}{folder.name}/{path.relative_to(folder)}")
        return file

    return write
