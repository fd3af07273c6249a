"""From an image file to the uint8 tensor that a backbone wants.

As in the MambaPEFT recipe: convert to RGB, resize both sides straight to the target size ("squash"), no crop
and no augmentation. Normalisation happens later, on the device, from the same record.
"""

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.untrusted import count_scans, read_bytes

# Of Pillow's readers only these, which decode and nothing else: that of EPS, for one, would start Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Of one image. A small file can promise far more pixels than there is memory: a decompression bomb.
MAX_PIXELS = 80_000_000
MAX_IMAGE_BYTES = 256_000_000  # of one file
# Each scan of a JPEG is decoded over all of its pixels. Progressive files usually have about ten.
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 20 * MAX_PIXELS

# Good images carry more text (metadata of cameras and editors) than Pillow's 1 MB; all of a file's text stays bounded.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_WHITE_IS_ZERO = 0  # of TIFF's tag 262, photometric interpretation
_PHOTOMETRIC = 262
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects of its images.

    Args:
        size: (height, width) in pixels.
        interpolation: Pillow filter, which antialiases when it shrinks.
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
    def from_timm(cls, default_cfg: Mapping[str, Any]) -> "Preprocessing":
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
def open_image(image: Path | bytes) -> Iterator[Image.Image]:
    """Opens an image of one of `FORMATS`, its pixels still undecoded.

    Args:
        image: a file, or its content. Of several frames the first one is decoded.

    Raises:
        ValueError: for one that is too large, has pixels of unknown range, or is no plain file.
        FileNotFoundError: for a missing file.
        Exception: for a damaged file, whatever Pillow's reader of that format raises.
    """
    content = image if isinstance(image, bytes) else read_bytes(image, max_bytes=MAX_IMAGE_BYTES, follow_links=True)
    if not content:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        pixels = opened.width * opened.height
        if pixels > MAX_PIXELS:
            raise ValueError(f"{pixels:,} pixels, at most {MAX_PIXELS:,} are decoded")
        if opened.format in ("JPEG", "MPO"):
            scans = count_scans(content)
            if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
                raise ValueError(f"{scans:,} scans of {pixels:,} pixels, at most {MAX_SCANS} scans are decoded")
        if opened.mode == "F" or (opened.mode == "I" and opened.format not in ("PNG", "PPM")):
            raise ValueError(f"32-bit pixels (mode {opened.mode}), whose range is not known; convert it to 8 bits")
        yield opened


def describe_failure(error: Exception) -> str:
    """Why an image cannot be decoded, for the end of a message that names the file."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return plain(error) if type(error) in (ValueError, UserError) else f"{type(error).__name__}: {plain(error)}"


def to_rgb(image: Image.Image) -> Image.Image:
    """The (first) image as RGB. Of 16-bit grey values the high byte counts, as Pillow takes it of 16-bit colours."""
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        # Pillow inverts such TIFFs of up to 8 bits itself, those of 16 it does not.
        inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        image = Image.fromarray(~grey if inverted else grey)
    return image.convert("RGB")


def decode_image(image: Path | bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Decodes and resizes one image → uint8 [3, H, W], contiguous. Raises as `open_image` does."""
    height, width = preprocessing.size
    with open_image(image) as opened:
        rgb = to_rgb(opened).resize((width, height), _RESAMPLING[preprocessing.interpolation])
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
