"""From an image file to the uint8 tensor that a backbone reads.

As in the MambaPEFT recipe: convert to RGB (or to the channels that the backbone takes), resize both sides straight to
the target size ("squash"), no crop and no augmentation. Normalisation happens later, on the device, from the same
record.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from mambapeft_vision.utils.budget import Budget
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.untrusted import array_from, count_scans, read_bytes

# The allowed readers of Pillow, which decode and do nothing else. The reader of EPS, for one, would start Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pixels of one image. A small file can promise far more pixels than there is memory: a decompression bomb.
MAX_PIXELS = 80_000_000
# Pixels that all threads together decode at a time, 12 bytes each: two photographs, or one larger image.
_decoded_at_once = Budget(25_000_000)
MAX_IMAGE_BYTES = 256_000_000  # one file
MAX_CHANNELS = 1_000
# Each scan of a JPEG is decoded over all of its pixels. Progressive files usually have about ten.
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 20 * MAX_PIXELS
# Bytes of a file in a form that Pillow decodes value by value in Python.
MAX_SLOW_BYTES = 10_000_000

# Good images carry more text (metadata of cameras and editors) than Pillow's 1 MB; all of a file's text stays bounded.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

ARRAY_MAGIC = b"\x93NUMPY"
_WHITE_IS_ZERO = 0  # value of TIFF's tag 262, photometric interpretation
_PHOTOMETRIC = 262
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """The preparation of a backbone's images.

    Args:
        size: (height, width) in pixels.
        interpolation: Pillow filter, which antialiases when it shrinks.
        mean, std: per channel, for pixels scaled to [0, 1]: of RGB, of grey, or of any number of channels.
    """

    size: tuple[int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for field in ("size", "mean", "std"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"Preprocessing size {self.size}: expected (height, width) in pixels, both at least 1.")
        if math.prod(self.size) > MAX_PIXELS:
            raise UserError(f"Preprocessing size {self.size}: expected at most {MAX_PIXELS:,} pixels. Lower img_size.")
        if self.interpolation not in _RESAMPLING:
            raise UserError(
                f"Preprocessing interpolation {self.interpolation!r}: expected one of "
                f"{', '.join(_RESAMPLING)}. Correct the backbone's timm record."
            )
        if (
            not 1 <= len(self.mean) == len(self.std) <= MAX_CHANNELS
            or min(self.std) <= 0
            or not all(map(math.isfinite, self.mean + self.std))
        ):
            raise UserError(
                f"Preprocessing mean {self.mean}, std {self.std}: expected as many numbers each, one a channel, "
                f"at most {MAX_CHANNELS}, and std above 0. Correct the backbone's timm record."
            )

    @property
    def channels(self) -> int:
        return len(self.mean)

    @classmethod
    def from_timm(cls, default_cfg: Mapping[str, Any]) -> "Preprocessing":
        """From a timm record (`model.default_cfg`): `input_size` (C, H, W), `interpolation`, `mean`, `std`.

        The record's crop is not used: images are squashed. The record has mean and std of RGB. For a backbone with
        other channels, grey gets their averages, and more channels get them in turn, as timm repeats the weights of
        the patch embedding.
        """
        missing = [key for key in ("input_size", "interpolation", "mean", "std") if key not in default_cfg]
        if missing:
            raise UserError(
                f"The backbone's default_cfg lacks {', '.join(missing)}: it has "
                f"{', '.join(default_cfg) or 'nothing'}. Add them to the backbone's timm record, from which images "
                "are prepared."
            )
        channels, height, width = default_cfg["input_size"]
        return cls(
            size=(height, width),
            interpolation=default_cfg["interpolation"],
            mean=_of_channels(default_cfg["mean"], channels),
            std=_of_channels(default_cfg["std"], channels),
        )


def _of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if channels == len(values):
        return tuple(values)
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(channels))


@contextmanager
def open_image(image: Path | bytes) -> Iterator[Image.Image]:
    """Opens an image of one of `FORMATS`, its pixels still undecoded.

    Args:
        image: a file, or its content. Of several frames the first one is decoded.

    Raises:
        ValueError: for an image that is too large or has pixels of unknown range, and for anything but a plain file.
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
        if len(content) > MAX_SLOW_BYTES and _is_slow(opened, content):
            raise ValueError(f"{len(content):,} bytes in a form that is slow to decode; convert it to PNG or JPEG")
        if opened.mode == "F" or (opened.mode == "I" and opened.format not in ("PNG", "PPM")):
            raise ValueError(f"32-bit pixels (mode {opened.mode}), whose range is not known; convert it to 8 bits")
        with _decoded_at_once.of(pixels):
            yield opened


def _is_slow(image: Image.Image, content: bytes) -> bool:
    """Whether numbers are written out as text (PPM), or equal pixels counted (BMP)."""
    return content[:2] in (b"P1", b"P2", b"P3") or (image.format == "BMP" and bool(image.info.get("compression")))


def describe_failure(error: Exception) -> str:
    """Why an image cannot be decoded, for the end of a message that names the file."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return plain(error) if type(error) in (ValueError, UserError) else f"{type(error).__name__}: {plain(error)}"


def to_rgb(image: Image.Image) -> Image.Image:
    """The (first) image as RGB. 16-bit grey values keep their high byte, as 16-bit colours do in Pillow."""
    return _eight_bits(image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        # Pillow inverts such TIFFs of up to 8 bits itself, those of 16 it does not.
        inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        return Image.fromarray(~grey if inverted else grey)
    return image


def decode_image(image: Path | bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Decodes and resizes one image → uint8 [C, H, W], contiguous. Raises as `open_image` does.

    Three channels are RGB and one is grey, whatever the image is. Any other number must be that of the image: two are
    grey and alpha, four RGB and alpha, or cyan, magenta, yellow and key. Channels beyond these come as arrays in
    NumPy's format (.npy), [H, W] or [H, W, C], of 8 or 16 bits.
    """
    content = image if isinstance(image, bytes) else read_bytes(image, max_bytes=MAX_IMAGE_BYTES, follow_links=True)
    if content.startswith(ARRAY_MAGIC):
        return resized(planes_of_array(content), preprocessing)
    with open_image(content) as opened:
        return resized(planes_of(opened, preprocessing.channels), preprocessing)


def planes_of(image: Image.Image, channels: int) -> Image.Image | list[Image.Image]:
    """Splits an image into its channels. Raises ValueError if it does not have that many."""
    if channels == 3:
        return to_rgb(image)
    if channels == 1:
        return _eight_bits(image).convert("L")
    if len(image.getbands()) != channels:
        raise ValueError(f"{len(image.getbands())} channels ({image.mode}); the backbone takes {channels}")
    image.load()
    return list(image.split())


def planes_of_array(content: bytes) -> list[Image.Image]:
    """The channels of an image in NumPy's format. Raises UserError or ValueError."""
    array = array_from(content, kinds="u")
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.itemsize > 2 or array.shape[2:] > (MAX_CHANNELS,):
        raise ValueError(f"an array of {array.dtype} {array.shape}; expected uint8 or uint16 [H, W] or [H, W, C]")
    if array.size > MAX_PIXELS * 4:
        raise ValueError(f"{array.size:,} values, at most {MAX_PIXELS * 4:,} are read")
    if array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)  # the high byte, as of other 16-bit images
    array = array[..., None] if array.ndim == 2 else array
    return [Image.fromarray(np.ascontiguousarray(array[..., channel])) for channel in range(array.shape[2])]


def resized(image: Image.Image | list[Image.Image], preprocessing: Preprocessing) -> np.ndarray:
    """An image, or its channels one by one, in the size of the backbone → uint8 [C, H, W], contiguous."""
    height, width = preprocessing.size
    filter_ = _RESAMPLING[preprocessing.interpolation]
    if isinstance(image, list):  # by Pillow at once, alpha would weigh the colours
        if len(image) != preprocessing.channels:
            raise ValueError(f"{len(image)} channels; the backbone takes {preprocessing.channels}")
        return np.stack([np.asarray(plane.resize((width, height), filter_)) for plane in image])
    pixels = np.asarray(image.resize((width, height), filter_))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None])


def check_image(content: bytes) -> None:
    """Decodes an image to its last pixel. Raises as `open_image` does."""
    if content.startswith(ARRAY_MAGIC):
        planes_of_array(content)
        return
    with open_image(content) as opened:
        opened.load()
