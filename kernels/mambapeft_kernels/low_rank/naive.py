"""The definition of the low-rank update."""

import torch
from torch import Tensor


def low_rank_add(out: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    """out += low @ (scale · up)ᵀ in place, with scale · up rounded to low's dtype before the product.

    Args: out [m, n], low [m, r] of one dtype, up [n, r].
    Returns: scale · up in low's dtype [n, r]; `up` itself where that is the same.
    """
    up = up.to(low.dtype) if scale == 1 else torch.mul(up, scale, out=up.new_empty(up.shape, dtype=low.dtype))
    out.addmm_(low, up.T)
    return up
