"""The definitions of LayerNorm and of residual add + drop path + LayerNorm."""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, shift: Tensor | None = None) -> Tensor:
    """(x - mean(x)) / √(var(x) + eps) · weight + bias over the last dimension, x plus shift; in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide if shift is None else wide + shift
    centred = wide - wide.mean(-1, keepdim=True)
    unit = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (unit * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype)


def add_layer_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    branch_scale: Tensor | None = None,
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """residual' = residual + branch_scale · hidden;  normed = LayerNorm(residual'), in `hidden`'s dtype."""
    total = add_branch(hidden, residual, branch_scale)
    normed = layer_norm(total, weight, bias, eps).to(hidden.dtype)
    return normed, total.to(hidden.dtype) if narrow else total


def add_branch(hidden: Tensor, residual: Tensor | None, branch_scale: Tensor | None) -> Tensor:
    """residual + branch_scale · hidden, in at least float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    branch = hidden.to(wide)
    if branch_scale is not None:
        branch = branch * branch_scale.to(wide).view(-1, *[1] * (hidden.ndim - 1))
    return branch if residual is None else residual + branch
