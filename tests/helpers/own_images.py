"""Small trees and tables of own images, drawn on the spot."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def draw(file: Path, label: int, number: int, mode: str = "RGB") -> Path:
    """A learnable image of 12x10 pixels, which no other label and number has: its class is its brightest quarter."""
    random = np.random.RandomState(1000 * label + number)
    pixels = random.randint(0, 100, (12, 10, 4), dtype=np.uint8)
    row, column = divmod(label % 4, 2)
    pixels[6 * row : 6 * row + 6, 5 * column : 5 * column + 5] += 150
    pixels[..., 3] = random.randint(0, 256, (12, 10))
    file.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": 0, "RGB": slice(0, 3), "RGBA": slice(0, 4)}[mode]
    Image.fromarray(pixels[..., channels]).save(file)
    return file


def tree(folder: Path, images: Mapping[str, int], mode: str = "RGB") -> Path:
    """`folder/<class>/00.png …` with so many images of each class."""
    for label, (name, count) in enumerate(images.items()):
        for number in range(count):
            draw(folder / name / f"{number:02}.png", label, number, mode)
    return folder
