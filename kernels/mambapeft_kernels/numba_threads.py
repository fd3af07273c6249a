"""How PyTorch's tensors reach loops that Numba compiles: as arrays, in as many threads as PyTorch uses."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory where it is contiguous, else a copy."""
    return tensor.detach().contiguous().numpy()


def over_batch(loop: Callable[..., None], batch: int, *arguments: Any) -> None:
    """Runs loop(*arguments, first, last) over all samples, in as many threads as PyTorch uses."""
    parts = min(torch.get_num_threads(), batch)
    if parts <= 1:
        loop(*arguments, 0, batch)
        return
    bounds = [batch * i // parts for i in range(parts + 1)]
    pool = _pool(os.getpid(), torch.get_num_threads())
    for done in [pool.submit(loop, *arguments, a, b) for a, b in itertools.pairwise(bounds)]:
        done.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)  # one for each process: a forked one has none of its parent's threads
