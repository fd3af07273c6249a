"""Decoding into the cache in a process of its own, while this one trains on a GPU.

A test split of VTAB-1K has up to 73,728 images, which take as long to decode as a good part of the training. Threads
would contend with the training loop for Python's lock; a process does not.
"""

import multiprocessing
import os
import time
from contextlib import suppress
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from mambapeft_vision.data.cache import cached_list
from mambapeft_vision.data.image_list import ImageList, parse_list
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.utils.processes import end_with_parent
from mambapeft_vision.utils.progress import Progress, ProgressCallback

_LOOK_EVERY_S = 0.2


class Prefetch:
    """Fills the cache with a list's images. Errors are ignored here: the next reader decodes them itself and reports.

    Args:
        num_classes: the task's number of classes.
        folder: the cache's folder.
    """

    def __init__(self, listing: ImageList, num_classes: int, preprocessing: Preprocessing, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would share what CUDA has started
        self._total, self._done = len(listing), context.Value("q", 0)
        self._started = time.monotonic()
        # The list's file, not its entries: starting would wait until the process, its imports done, has read them.
        several = listing.several is not None
        arguments = (listing.file, num_classes, several, preprocessing, folder, self._done)
        self._process = context.Process(target=_decode, args=arguments, name="prefetch", daemon=True)
        self._process.start()

    def wait(self, progress: ProgressCallback | None = None) -> None:
        """Returns when the process has ended; meanwhile it calls `progress`."""
        while self._process.is_alive():
            self._process.join(_LOOK_EVERY_S)
            if progress is not None and 0 < self._done.value < self._total:
                progress(Progress(self._done.value, self._total, time.monotonic() - self._started))


def _decode(
    file: Path, num_classes: int, several: bool, preprocessing: Preprocessing, folder: Path, done: Synchronized
) -> None:
    end_with_parent()
    with suppress(OSError):
        os.nice(5)  # the training process comes first

    def count(progress: Progress) -> None:
        done.value = progress.done

    with suppress(Exception):
        listing, _ = parse_list(file, num_classes, several=several)
        cached_list(listing, preprocessing, folder, count, must_keep=True)
