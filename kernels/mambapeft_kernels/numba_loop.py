"""The decorator of the loops that Numba compiles for CPUs and keeps on the disk."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

# Multiply-adds may be fused. Nothing may be regrouped: it would undo numba_math's two-part subtraction of k ln 2.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "nsz"}, "error_model": "numpy", "nogil": True}
_INLINED = "numba_lanes.py", "numba_math.py"
_SOURCES = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _INLINED)).hexdigest()


def loop(function: Callable[..., None]) -> Any:
    """Compiles a function, to run without Python's lock, or loads what an earlier process compiled and kept.

    Numba takes what it kept for current while the function's own file is unchanged. What is inlined into it comes from
    other files, so their hash is compared too.
    """
    compiled = njit(cache=True, **_OPTIONS)(function)
    kept = compiled._cache._cache_file
    kept._source_stamp = (*kept._source_stamp, _SOURCES)
    return compiled


def inlined(function: Callable[..., Any]) -> Any:
    """A function that becomes part of the loops that call it."""
    return njit(forceinline=True, **_OPTIONS)(function)
