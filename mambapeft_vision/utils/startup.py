"""How the commands import PyTorch, timm and Lightning."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_kept() -> Iterator[None]:
    """Imports made in this context are excluded from garbage collection (first use in a process only).

    While importing, collections take a fifth of the time; later ones would go through all of it, 0.3 s before each
    recording of a CUDA graph.
    """
    if "torch" in sys.modules:  # a second run in this process: what the first one left is to be collected
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
