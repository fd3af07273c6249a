"""Decoded images on disk: a task's images are decoded and resized once for each preprocessing, by the first run.

A cached split is one file, uint8 [n, C, H, W] in NumPy's format, that runs map into memory. Its name is a hash over the
content of the images, in list order, and of everything that decides how they are decoded; so a changed image gives
another file, and a file never changes. It is written under another name and renamed when complete; a second process
that needs it waits.

The checksum follows the pixels. A process compares it before it first uses the file; a damaged file is named, deleted
and decoded again. The checksum finds damage, not intent: anybody who can write to the folder can change the images.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch

from mambapeft_vision.data.image_list import ImageList
from mambapeft_vision.data.images import ImageSet, decode_into, decode_list
from mambapeft_vision.data.manifest import images_digest
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.utils.atomic import allocate
from mambapeft_vision.utils.console import warn
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.lock import remove_abandoned, sole_writer
from mambapeft_vision.utils.processes import available_cpus
from mambapeft_vision.utils.progress import ProgressCallback
from mambapeft_vision.utils.untrusted import open_plain

# Splits that take less memory than this are decoded in the time that looking them up would take.
SMALLEST = 32 << 20
# Version of the file and of decoding. 2: 16-bit grey by its high byte; 3: checksum, 16-bit TIFFs of any kind.
_FORMAT = 3
SPARE = 1 << 30  # bytes of the disk that are left to others
# The cache is kept below this. All of VTAB-1K at 224x224 would be 59 GB, but a sweep goes task by task.
LARGEST = 40 << 30
SUFFIX = ".images.npy"
_OUR_NAME = r"[0-9a-f]+\.images\.npy"
_BLOCK = 16 << 20  # hashed at once by a thread
_DIGEST_BYTES = 32
_TOUCH_AFTER_S = 3600.0  # "last used" is noted to the hour
Fill = Callable[[np.ndarray], None]  # puts a list's decoded images into an array, [n, C, H, W]
verified: set[tuple[int, int, int, int]] = set()  # files whose checksum this process has compared


def is_cacheable(listing: ImageList, preprocessing: Preprocessing) -> bool:
    """Whether the list is large enough for the cache."""
    return _size(listing, preprocessing) >= SMALLEST


def cached_list(
    listing: ImageList,
    preprocessing: Preprocessing,
    folder: Path | None,
    progress: ProgressCallback | None = None,
    *,
    fill: Fill | None = None,
    must_keep: bool = False,
) -> ImageSet:
    """The decoded images of a list: from the cache, or decoded and put there.

    Where the folder cannot be written or lacks the space, the images are decoded into memory, with a warning.

    Args:
        folder: the cache's folder; None: no cache.
        progress: called while images are decoded.
        fill: decodes into the cache's file; None: `decode_into`.
        must_keep: nothing is decoded that the cache cannot take.

    Raises:
        UserError: for an image that is missing or damaged; with `must_keep` for a cache that takes nothing.
    """
    if folder is None or not is_cacheable(listing, preprocessing):
        return decode_list(listing, preprocessing, progress=progress)
    file = folder / f"{_key(listing, preprocessing)}{SUFFIX}"
    shape = (len(listing), preprocessing.channels, *preprocessing.size)
    images = _open(file, shape)
    if images is None:
        obstacle = obstacle_to_caching(folder, _size(listing, preprocessing))
        if obstacle is None:
            by_threads = partial(decode_into, listing=listing, preprocessing=preprocessing, progress=progress)
            obstacle = _fill(file, shape, fill or by_threads)
        if obstacle is not None:
            if must_keep:
                raise UserError(obstacle)
            warn(f"decoded images are not kept: {obstacle}")
            return decode_list(listing, preprocessing, progress=progress)
        images = _open(file, shape)
        clean(folder, LARGEST)
        if images is None:  # cleaned away by another process at once: its cache is far too small
            return decode_list(listing, preprocessing, progress=progress)
    return ImageSet(torch.from_numpy(images), listing.labels(), [entry.path for entry in listing.entries])


def _fill(file: Path, shape: tuple[int, ...], fill: Fill) -> str | None:
    """Decodes into the cache, or waits for the process that does. Returns the disk's error, None if there is none."""
    try:
        with sole_writer(file) as temporary:
            if temporary is not None:
                _decode_to(temporary, shape, fill)
    except OSError as error:
        return f"{file.parent}: {error.strerror}; set paths.cache to another disk or to null"
    return None


def _decode_to(file: Path, shape: tuple[int, ...], fill: Fill) -> None:
    header = _header(shape)
    pixels = int(np.prod(shape))
    with open(file, "wb+") as opened:
        opened.write(header)
        # The disk allocates the whole file now: a mapped file that finds the disk full is the process's sudden end.
        allocate(opened.fileno(), len(header) + pixels + _DIGEST_BYTES)
        opened.flush()
        images = np.memmap(opened, np.uint8, "r+", offset=len(header), shape=shape)
        fill(images)
        images.flush()
        opened.seek(len(header) + pixels)
        opened.write(checksum(opened.fileno(), len(header), pixels))


def _header(shape: tuple[int, ...]) -> bytes:
    """The header of NumPy's format; equal for equal shapes, so that it can be compared instead of parsed."""
    content = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = 128 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + content.ljust(length - 1) + b"\n"


def checksum(descriptor: int, start: int, size: int) -> bytes:
    """Checksum of `size` bytes from `start` on: blocks are hashed by all CPUs, so that the disk is the limit."""

    def digest(position: int) -> bytes:
        count = min(_BLOCK, start + size - position)
        return hashlib.blake2b(os.pread(descriptor, count, position), digest_size=_DIGEST_BYTES).digest()

    with ThreadPoolExecutor(available_cpus()) as pool:
        digests = pool.map(digest, range(start, start + size, _BLOCK))
        return hashlib.blake2b(b"".join(digests), digest_size=_DIGEST_BYTES).digest()


def clean(folder: Path, keep_bytes: int) -> list[tuple[Path, int]]:
    """Deletes the least recently used files until `keep_bytes` are left; returns the deleted files and their sizes.

    A run that has mapped a deleted file can still use it.
    """
    remove_abandoned(folder, _OUR_NAME)
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
    """The cache's files, their bytes and times of last use (seconds since 1970), the least recently used first."""
    found = [(file, file.stat()) for file in folder.glob(f"*{SUFFIX}")] if folder.is_dir() else []
    return sorted(((file, stat.st_size, stat.st_mtime) for file, stat in found), key=lambda entry: entry[2])


def _size(listing: ImageList, preprocessing: Preprocessing) -> int:
    """Bytes of the decoded images."""
    height, width = preprocessing.size
    return len(listing) * preprocessing.channels * height * width


def _key(listing: ImageList, preprocessing: Preprocessing) -> str:
    decided_by = [_FORMAT, PIL.__version__, list(preprocessing.size), preprocessing.interpolation]
    if preprocessing.channels != 3:
        decided_by.append(preprocessing.channels)
    return hashlib.sha256(json.dumps(decided_by).encode() + images_digest(listing)).hexdigest()[:40]


def _open(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The file's array, mapped; None where it is not there. A damaged file is named and removed."""
    header = _header(shape)
    pixels = int(np.prod(shape))
    try:
        with open_plain(file, max_bytes=len(header) + pixels + _DIGEST_BYTES) as opened:
            if _is_whole(opened.fileno(), header, pixels):
                _note_use(file, opened.fileno())
                # Writable in memory alone, as PyTorch wants it.
                return np.memmap(opened, np.uint8, "c", offset=len(header), shape=shape)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UserError):
        pass  # a disk that cannot read it, or no file of ours
    warn(f"{file} was damaged; its images are decoded again")
    with suppress(OSError):
        file.unlink(missing_ok=True)
    return None


def _is_whole(descriptor: int, header: bytes, pixels: int) -> bool:
    if _identity(descriptor) in verified:
        return True
    end = len(header) + pixels
    return (
        os.fstat(descriptor).st_size == end + _DIGEST_BYTES
        and os.pread(descriptor, len(header), 0) == header
        and os.pread(descriptor, _DIGEST_BYTES, end) == checksum(descriptor, len(header), pixels)
    )


def _note_use(file: Path, descriptor: int) -> None:
    """Notes that the file is whole and has just been used, for `clean`."""
    with suppress(OSError):  # a cache that others made may be read-only
        if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_AFTER_S:
            os.utime(file)
    verified.add(_identity(descriptor))


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def obstacle_to_caching(folder: Path, size: int) -> str | None:
    """Why a file of `size` bytes cannot be written to `folder`; None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return f"{folder} cannot be written to; set paths.cache to a folder that can, or to null"
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder}: {error.strerror}; set paths.cache to a folder that can be written to, or to null"
    if free < size + SPARE:
        return (
            f"{folder} has {free / 2**30:.1f} GiB left and {size / 2**30:.1f} are needed beside a reserve of 1; "
            f"clean it (mambapeft cache), or set paths.cache to another disk or to null"
        )
    return None
