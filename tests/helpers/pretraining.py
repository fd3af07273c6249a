"""Sources and sizes for tiny pretraining runs."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TINY = {"embed_dim": 16, "depth": 1, "img_size": 16}


def write_source(file: Path, splits: Sequence[str] | None = None, number: int = 24) -> str:
    """An npz file with two classes: dark images and light ones."""
    contents = []
    for i in range(number):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (40 + 160 * (i % 2),) * 3).save(stream, "PNG")
        contents.append(stream.getvalue())
    arrays = {
        "blob": np.frombuffer(b"".join(contents), np.uint8),
        "offsets": np.cumsum([0, *map(len, contents)]),
        "labels": np.arange(number) % 2,
        "class_names": np.array(["dark", "light"]),
    }
    np.savez(file, **arrays, **({} if splits is None else {"split": np.array(splits)}))
    return str(file)
