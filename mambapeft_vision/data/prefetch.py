"""Decoding into the cache in processes of their own, while this one trains on a GPU.

A test split of VTAB-1K has up to 73,728 images, which take as long to decode as a good part of the training. Threads
would contend with the training loop, and with each other, for Python's lock; processes do not.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

import numpy as np

from mambapeft_vision.data.cache import cached_list
from mambapeft_vision.data.image_list import ImageList, parse_list
from mambapeft_vision.data.images import decode_into
from mambapeft_vision.data.manifest import images_digest, known_digests
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.processes import available_cpus, end_with_parent
from mambapeft_vision.utils.progress import Progress, ProgressCallback

_LOOK_EVERY_S = 0.2
_THREADS = 2  # in each process; with more they wait for Python's lock
_MOST_PROCESSES = 4


class Prefetch:
    """Fills the cache with a list's images. Errors are ignored here: the next reader decodes them itself and reports.

    Args:
        num_classes: the task's number of classes.
        folder: the cache's folder.
        processes: that decode; None: as many as the CPUs allow, up to four.
    """

    def __init__(
        self,
        listing: ImageList,
        num_classes: int,
        preprocessing: Preprocessing,
        folder: Path,
        processes: int | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would share what CUDA has started
        processes = processes or max(1, min(_MOST_PROCESSES, available_cpus() // _THREADS))
        self._total, self._done = len(listing), context.Array("q", processes)
        self._started = time.monotonic()
        self._digests, digests = context.Pipe(duplex=False)
        # The list's file, not its entries: starting would wait until the process, its imports done, has read them.
        read = partial(parse_list, listing.file, num_classes, several=listing.several is not None)
        arguments = (read, preprocessing, folder, self._done, digests)
        self._process = context.Process(target=_fill_cache, args=arguments, name="prefetch", daemon=True)
        self._process.start()
        digests.close()

    def wait(self, progress: ProgressCallback | None = None) -> None:
        """Returns when the process has ended; meanwhile it calls `progress`."""
        while self._process.is_alive():
            self._process.join(_LOOK_EVERY_S)
            done = sum(self._done[:])
            if progress is not None and 0 < done < self._total:
                progress(Progress(done, self._total, time.monotonic() - self._started))
        with suppress(EOFError, OSError):  # it has failed
            known_digests.update(self._digests.recv())  # this process need not read the images, too
        self._digests.close()


def _fill_cache(
    read: Callable[[], tuple[ImageList, list[str]]],
    preprocessing: Preprocessing,
    folder: Path,
    done: "SynchronizedArray[int]",
    digests: Connection,
) -> None:
    end_with_parent()
    with suppress(OSError):
        os.nice(5)  # the training process comes first
    with suppress(Exception):
        listing, _ = read()
        images_digest(listing)
        digests.send(known_digests)
        fill = partial(_decode_by_parts, listing=listing, preprocessing=preprocessing, done=done)
        cached_list(listing, preprocessing, folder, fill=fill, must_keep=True)


def _decode_by_parts(
    images: np.ndarray, listing: ImageList, preprocessing: Preprocessing, done: "SynchronizedArray[int]"
) -> None:
    """As `decode_into`, for an array that is a mapped file: each of several forked processes fills a part of it.

    done: for each process, the images that it has decoded.
    """
    bounds = [len(listing) * number // len(done) for number in range(len(done) + 1)]

    def decode(number: int) -> None:
        def count(progress: Progress) -> None:
            done[number] = progress.done

        first, last = bounds[number : number + 2]
        part = listing.chosen(range(first, last))
        decode_into(images[first:last], part, preprocessing, workers=_THREADS, progress=count)

    children = [_fork(partial(decode, number)) for number in range(len(done))]
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise UserError(f"{listing.file}: an image cannot be decoded")


def _fork(work: Callable[[], None]) -> int:
    """Does some work in a forked process, whose exit code is 1 where it fails. Returns the process's number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        end_with_parent()  # the parent of the process that forks: both end with it
        work()
        code = 0
    finally:
        os._exit(code)
