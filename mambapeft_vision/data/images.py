"""Decoded images in memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from mambapeft_vision.data.image_list import Entry, ImageList
from mambapeft_vision.data.preprocessing import FORMATS, Preprocessing, decode_image
from mambapeft_vision.utils.progress import ProgressCallback, ProgressMeter


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 [n, 3, H, W]; labels: int64 [n]; names: n paths relative to the task's folder."""

    images: Tensor
    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `chosen`, int64 [b]."""
        return self.images[chosen], self.labels[chosen]

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with images and labels on `device` (1,000 images of 224x224 are 150 MB)."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def available_cpus() -> int:
    """CPUs this process may use, which in a container can be far fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decode_entry(listing: ImageList, entry: Entry, preprocessing: Preprocessing) -> np.ndarray:
    """One image of a list → uint8 [3, H, W]. Raises UserError that names image, list file and line."""
    try:
        return decode_image(listing.path(entry), preprocessing)
    except FileNotFoundError as error:
        raise listing.error(entry, "the image does not exist.") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise far more than OSError on damaged files
        raise listing.error(entry, f"cannot decode the image ({_reason(error, listing.path(entry))}).") from error


def _reason(error: Exception, file: Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = file.is_file() and not file.stat().st_size
        return "the file is empty" if empty else f"it is none of {', '.join(FORMATS)}"
    return f"{type(error).__name__}: {error}"


def decode_list(
    listing: ImageList,
    preprocessing: Preprocessing,
    *,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> ImageSet:
    """Decodes all images of a list with a pool of threads (Pillow releases the GIL); order as in the list.

    workers: threads, by default one a CPU; progress: called with images done, images/s and time left.
    Raises UserError for the first image, in list order, that is missing or damaged.
    """
    height, width = preprocessing.size
    images = np.empty((len(listing), 3, height, width), dtype=np.uint8)
    decode_into(images, listing, preprocessing, workers=workers, progress=progress)
    names = [entry.path for entry in listing.entries]
    return ImageSet(torch.from_numpy(images), listing.labels(), names)


def decode_into(
    images: np.ndarray,
    listing: ImageList,
    preprocessing: Preprocessing,
    *,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Fills `images`, uint8 [n, 3, H, W], as `decode_list` does."""
    meter = ProgressMeter(len(listing), progress)

    def decode(index: int) -> None:
        images[index] = decode_entry(listing, listing.entries[index], preprocessing)

    # An error, or Ctrl-C, leaves the loop; map then cancels what is still waiting.
    with ThreadPoolExecutor(workers or available_cpus()) as pool:
        for _ in pool.map(decode, range(len(listing))):
            meter.advance()
