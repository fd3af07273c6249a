"""From an image file to the uint8 tensor that a backbone wants.

As in the MambaPEFT recipe: convert to RGB, resize both sides straight to the target size ("squash"), no crop
and no augmentation. Normalisation happens later, on the device, from the same record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from mambapeft_vision.utils.errors import UserError

# Of Pillow's readers only these, which decode and nothing else: that of EPS, for one, would start Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Of one image. A small file can promise far more pixels than there is memory: a decompression bomb.
MAX_PIXELS = 80_000_000

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects of its images.

    size: (height, width) in pixels; interpolation: Pillow filter, which antialiases when it shrinks;
    mean, std: per RGB channel, for pixels scaled to [0, 1].
    """

    size: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for field in ("size", "mean", "std"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"Preprocessing size {self.size}: expected (height, width) in pixels, both at least 1.")
        if self.interpolation not in _RESAMPLING:
            raise UserError(
                f"Preprocessing interpolation {self.interpolation!r}: expected one of "
                f"{', '.join(_RESAMPLING)}. Correct the backbone's timm record."
            )
        if (
            len(self.mean) != 3
            or len(self.std) != 3
            or min(self.std) <= 0
            or not all(map(math.isfinite, self.mean + self.std))
        ):
            raise UserError(
                f"Preprocessing mean {self.mean}, std {self.std}: expected three numbers each, one a channel, "
                "and std above 0. Correct the backbone's timm record."
            )

    @classmethod
    def from_timm(cls, default_cfg: Mapping[str, Any]) -> Preprocessing:
        """From a timm record (`model.default_cfg`): `input_size` (3, H, W), `interpolation`, `mean`, `std`.

        The record's crop is not used: images are squashed.
        """
        missing = [key for key in ("input_size", "interpolation", "mean", "std") if key not in default_cfg]
        if missing:
            raise UserError(
                f"The backbone's default_cfg lacks {', '.join(missing)}: it has "
                f"{', '.join(default_cfg) or 'nothing'}. Add them to the backbone's timm record, from which images "
                "are prepared."
            )
        _, height, width = default_cfg["input_size"]
        return cls(
            size=(height, width),
            interpolation=default_cfg["interpolation"],
            mean=default_cfg["mean"],
            std=default_cfg["std"],
        )


@contextmanager
def open_image(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """Opens an image of one of `FORMATS`, its pixels still undecoded.

    Raises ValueError for one that is too large or has pixels of unknown range; FileNotFoundError; or for a damaged file
    whatever Pillow's reader of that format raises.
    """
    with Image.open(file, formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ValueError(f"{pixels:,} pixels, at most {MAX_PIXELS:,} are decoded")
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError(f"32-bit pixels (mode {image.mode}), whose range is not known; convert it to 8 bits")
        yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """The (first) image as RGB. Of 16-bit grey values the high byte counts, as Pillow takes it of 16-bit colours."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode_image(file: Path | BinaryIO, preprocessing: Preprocessing) -> np.ndarray:
    """Decodes and resizes one image file → uint8 [3, H, W], contiguous. Raises as `open_image` does."""
    height, width = preprocessing.size
    with open_image(file) as image:
        rgb = to_rgb(image).resize((width, height), _RESAMPLING[preprocessing.interpolation])
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
