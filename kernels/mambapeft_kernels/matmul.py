"""Matrix products whose result has another dtype than their factors."""

import torch
from torch import Tensor

# PyTorch >= 2.8, on GPUs
_CASTS = all("dtype" in op.overloads() for op in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm))


def product(a: Tensor, b: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """scale · a @ b in `dtype`, [m, n] or [batch, m, n]; on a GPU float32 comes unrounded from the product's sums."""
    if _CASTS and a.is_cuda and a.dtype != dtype == torch.float32:
        if a.ndim == 2 and scale != 1:
            unread = a.new_empty(a.shape[0], b.shape[1])  # whole: PyTorch 2.8 and 2.9 mishandle one that is broadcast
            return torch.addmm(unread, a, b, out_dtype=dtype, beta=0, alpha=scale)
        out = (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=dtype)
    else:
        out = (a @ b).to(dtype)
    return out if scale == 1 else out.mul_(scale)
