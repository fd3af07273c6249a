"""The process from which a sweep's workers are forked. It imports everything once, while the parent plans the sweep.

Light to import, so that it can be started before all else. Nothing in it may start CUDA: a process that is forked
afterwards could not use the GPU.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

# Modules that the server imports. The tests' own server imports more.
PRELOAD = ["mambapeft_vision.sweep.preload"]
# With it, torch.cuda.is_available() asks the driver's library for management instead of starting CUDA.
_NO_CUDA = "PYTORCH_NVML_BASED_CUDA_CHECK"

# Elsewhere (macOS) a process that has loaded such libraries cannot be forked safely: each worker imports by itself.
context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def start() -> None:
    """Starts the server unless it runs; returns while it still imports."""
    if context.get_start_method() != "forkserver":
        return
    context.set_forkserver_preload(PRELOAD)
    with interrupts_ignored(), _environment(_NO_CUDA, "1"):
        forkserver.ensure_running()


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes that are started in this context ignore Ctrl-C: their parent handles it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
