"""Decoded images in memory."""

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mambapeft_vision.data.image_list import Entry, ImageList
from mambapeft_vision.data.preprocessing import Preprocessing, decode_image, describe_failure
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.progress import ProgressCallback, ProgressMeter
from mambapeft_vision.utils.threads import map_in_threads


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels.

    Args:
        images: uint8 [n, C, H, W].
        labels: int64 [n], or float32 [n, classes] of 0 and 1 where images have several.
        names: n paths relative to the task's folder.
    """

    images: Tensor
    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `chosen`, int64 [b]."""
        return self.images[chosen], self.labels[chosen]

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set with images and labels on `device` (1,000 images of 224x224 are 150 MB)."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def decode_entry(listing: ImageList, entry: Entry, preprocessing: Preprocessing) -> np.ndarray:
    """One image of a list → uint8 [C, H, W]. Raises UserError that names image, list file and line."""
    try:
        return decode_image(listing.path(entry), preprocessing)
    except FileNotFoundError as error:
        raise listing.error(entry, "the image does not exist.") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise far more than OSError on damaged files
        raise listing.error(entry, f"cannot decode the image ({describe_failure(error)}).") from error


def decode_list(
    listing: ImageList,
    preprocessing: Preprocessing,
    *,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> ImageSet:
    """Decodes all images of a list with a pool of threads (Pillow releases the GIL); order as in the list.

    Args:
        workers: threads, by default one a CPU.
        progress: called with images done, images/s and time left.

    Raises:
        UserError: for the first image, in list order, that is missing or damaged.
    """
    height, width = preprocessing.size
    needed = len(listing) * preprocessing.channels * height * width
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"{listing.file}: the images take {needed / 2**30:,.1f} GiB at {height}x{width} pixels; the machine has "
            f"{there / 2**30:,.1f}. Lower backbone.img_size, or set paths.cache to a disk that holds them"
        )
    images = np.empty((len(listing), preprocessing.channels, height, width), dtype=np.uint8)
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
    """Fills `images`, uint8 [n, C, H, W], as `decode_list` does."""
    meter = ProgressMeter(len(listing), progress)

    def decode(index: int) -> None:
        images[index] = decode_entry(listing, listing.entries[index], preprocessing)

    for _ in map_in_threads(decode, range(len(listing)), workers):
        meter.advance()
