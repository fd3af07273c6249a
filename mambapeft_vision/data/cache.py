"""Decoded images on disk: a task's images are decoded and resized once for each preprocessing, by the first run.

A cached split is one file, uint8 [n, 3, H, W] in numpy's format, that runs map into memory. Its name is a hash over the
content of the images, in list order, and all that decides what becomes of them; so a changed image is another file, and
a file never changes. It is written under another name and renamed when whole; a second process that wants it waits.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch

from mambapeft_vision.data.image_list import ImageList
from mambapeft_vision.data.images import ImageSet, available_cpus, decode_into, decode_list
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.utils.lock import remove_abandoned, sole_writer
from mambapeft_vision.utils.progress import ProgressCallback

# Splits that take less memory than this are decoded in the time that looking them up would take.
SMALLEST = 32 << 20
_FORMAT = 2  # of what becomes of an image; 2: 16-bit grey by its high byte
_SPARE = 1 << 30  # bytes of the disk that are left to others
# The cache is kept below this. All of VTAB-1K at 224x224 would be 59 GB, but a sweep goes task by task.
LARGEST = 40 << 30
SUFFIX = ".images.npy"


def is_cacheable(listing: ImageList, preprocessing: Preprocessing) -> bool:
    """Whether the list is large enough for the cache."""
    return _size(listing, preprocessing) >= SMALLEST


def cached_list(
    listing: ImageList, preprocessing: Preprocessing, folder: Path | None, progress: ProgressCallback | None = None
) -> ImageSet:
    """The decoded images of a list: from the cache, or decoded and put there.

    Where the folder cannot be written or lacks the space, the images are decoded into memory, with a warning.

    Args:
        folder: of the cache; None: no cache.
        progress: of the decoding, if there is one.
    Raises: UserError for an image that is missing or damaged.
    """
    if folder is None or not is_cacheable(listing, preprocessing):
        return decode_list(listing, preprocessing, progress=progress)
    file = folder / f"{_key(listing, preprocessing)}{SUFFIX}"
    shape = (len(listing), 3, *preprocessing.size)
    images = _open(file, shape)
    if images is None:
        obstacle = _obstacle(folder, _size(listing, preprocessing))
        if obstacle is None:
            obstacle = _fill(file, shape, listing, preprocessing, progress)
        if obstacle is not None:
            warnings.warn(f"decoded images are not kept: {obstacle}", stacklevel=2)
            return decode_list(listing, preprocessing, progress=progress)
        images = _open(file, shape)
        clean(folder, LARGEST)
        if images is None:  # cleaned away by another process at once: its cache is far too small
            return decode_list(listing, preprocessing, progress=progress)
    with suppress(OSError):  # a cache that others made may be read-only
        os.utime(file)  # used now: what was not used for longest is cleaned first
    return ImageSet(torch.from_numpy(images), listing.labels(), [entry.path for entry in listing.entries])


def _fill(
    file: Path,
    shape: tuple[int, ...],
    listing: ImageList,
    preprocessing: Preprocessing,
    progress: ProgressCallback | None,
) -> str | None:
    """Decodes into the cache, or waits for the process that does; returns what the disk said against it."""
    try:
        with sole_writer(file) as temporary:
            if temporary is not None:
                written = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
                _reserve(temporary)
                decode_into(written, listing, preprocessing, progress=progress)
                written.flush()
    except OSError as error:
        return f"{file.parent}: {error.strerror}; set paths.cache to another disk or to null"
    return None


def _reserve(file: Path) -> None:
    """Has the disk allocate the whole of a file: a mapped file that finds the disk full is the process's sudden end."""
    with open(file, "rb+") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
                raise


def clean(folder: Path, keep_bytes: int) -> list[tuple[Path, int]]:
    """Deletes what was not used for longest until `keep_bytes` are left; returns the deleted files and their sizes.

    A run that has a deleted file mapped goes on with it.
    """
    remove_abandoned(folder)
    files = entries(folder)
    total, deleted = sum(size for _, size, _ in files), []
    for file, size, _ in files:
        if total <= keep_bytes:
            break
        file.unlink(missing_ok=True)
        total -= size
        deleted.append((file, size))
    return deleted


def entries(folder: Path) -> list[tuple[Path, int, float]]:
    """The cache's files, their bytes and when they were last used (seconds since 1970); the longest unused first."""
    found = [(file, file.stat()) for file in folder.glob(f"*{SUFFIX}")] if folder.is_dir() else []
    return sorted(((file, stat.st_size, stat.st_mtime) for file, stat in found), key=lambda entry: entry[2])


def _size(listing: ImageList, preprocessing: Preprocessing) -> int:
    """Bytes of the decoded images."""
    height, width = preprocessing.size
    return len(listing) * 3 * height * width


def _key(listing: ImageList, preprocessing: Preprocessing) -> str:
    def digest(entry) -> bytes:
        try:
            return hashlib.blake2b(listing.path(entry).read_bytes(), digest_size=16).digest()
        except OSError as error:
            raise listing.error(entry, f"cannot be read ({error.strerror}).") from error

    with ThreadPoolExecutor(available_cpus()) as pool:
        content = b"".join(pool.map(digest, listing.entries))
    decided_by = [_FORMAT, PIL.__version__, list(preprocessing.size), preprocessing.interpolation]
    return hashlib.sha256(json.dumps(decided_by).encode() + content).hexdigest()[:40]


def _open(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The file's array, mapped; None where it is not there. A damaged file is removed."""
    try:
        images = np.load(file, mmap_mode="c", allow_pickle=False)  # writable in memory alone, as PyTorch wants it
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError, EOFError):
        images = None
    if images is None or images.shape != shape or images.dtype != np.uint8:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    return images


def _obstacle(folder: Path, size: int) -> str | None:
    """Why nothing of `size` bytes can be written to `folder`; None: it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return f"{folder} cannot be written to; set paths.cache to a folder that can, or to null"
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder}: {error.strerror}; set paths.cache to a folder that can be written to, or to null"
    if free < size + _SPARE:
        return (
            f"{folder} has {free / 2**30:.1f} GiB left and {size / 2**30:.1f} are needed beside a reserve of 1; "
            f"clean it (scripts/decoded_cache.py), or set paths.cache to another disk or to null"
        )
    return None
