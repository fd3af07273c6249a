"""From an image file to the uint8 tensor that a backbone wants.

As in the MambaPEFT recipe: convert to RGB, resize both sides straight to the target size ("squash"), no crop
and no augmentation. Normalisation happens later, on the device, from the same record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mambapeft_vision.errors import UserError

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


def decode_image(file: Path, preprocessing: Preprocessing) -> np.ndarray:
    """Decodes and resizes one image file → uint8 [3, H, W], contiguous.

    Raises FileNotFoundError, or for a damaged file whatever Pillow's reader of that format raises.
    """
    height, width = preprocessing.size
    with Image.open(file) as image:
        rgb = image.convert("RGB").resize((width, height), _RESAMPLING[preprocessing.interpolation])
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
