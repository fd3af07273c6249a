"""The public functions of the low-rank update."""

import torch
from torch import Tensor

from mambapeft_kernels.backends import FUSED, resolve_for
from mambapeft_kernels.low_rank import naive


def low_rank_add(out: Tensor, low: Tensor, up: Tensor, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """out += low @ (scale · up)ᵀ in place, with scale · up rounded to low's dtype before the product.

    Not an op of autograd's: a function that calls it has a backward pass of its own.

    Args:
        out: [m, n], rows and columns with any strides (columns of a wider tensor).
        low: [m, r] in out's dtype, any strides.
        up: [n, r] in a dtype of its own.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: scale · up in low's dtype [n, r], for the gradients; `up` itself where that is the same.
    Raises: ValueError for shapes or dtypes that do not fit each other or a backend that cannot run here.
    """
    _check(out, low, up)
    if resolve_for(backend, out) in FUSED:
        from mambapeft_kernels.low_rank import triton_kernels as triton

        return triton.low_rank_add(out, low, up, scale)
    return naive.low_rank_add(out, low, up, scale)


def low_rank_product(
    out: Tensor, x: Tensor, weight: Tensor, low: Tensor, up: Tensor, scale: float = 1.0, backend: str = "auto"
) -> Tensor:
    """out = x @ weightᵀ + low @ (scale · up)ᵀ: a linear map and its update, in one launch where that is faster.

    Not an op of autograd's, as `low_rank_add`.

    Args:
        out: [m, n], contiguous, is overwritten. x: [m, k], weight: [n, k]. These have out's dtype.
        low, up, backend: as in `low_rank_add`.
    Returns: scale · up, as `low_rank_add` does.
    Raises: as `low_rank_add`.
    """
    _check(out, low, up)
    if resolve_for(backend, out) in FUSED:
        from mambapeft_kernels.low_rank import triton_kernels as triton

        if triton.takes(x, weight):
            return triton.low_rank_product(out, x, weight, low, up, scale)
    torch.mm(x, weight.T, out=out)
    return low_rank_add(out, low, up, scale, backend)


def _check(out: Tensor, low: Tensor, up: Tensor) -> None:
    fits = out.ndim == low.ndim == up.ndim == 2 and out.shape == (len(low), len(up)) and low.shape[1] == up.shape[1]
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in (out, low, up))
        raise ValueError(f"low_rank_add: expected out [m, n], low [m, r], up [n, r], got {shapes}")
    if out.dtype != low.dtype:
        raise ValueError(f"low_rank_add: out and low must have one dtype, got {out.dtype} and {low.dtype}; cast low")
