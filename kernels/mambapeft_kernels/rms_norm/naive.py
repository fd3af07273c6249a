"""The definition of residual add + drop path + RMSNorm."""

import torch
from torch import Tensor


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    branch_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual' = residual + branch_scale · hidden;  normed = residual' / rms(residual') · weight.

    Args:
        hidden: [B, L, D] output of the previous mixer (or the embedded tokens).
        residual: [B, L, D] running sum, at least float32; None: it starts at `hidden`.
        weight: [D].
        branch_scale: [B] factor of each sample's branch (drop path: 0 or 1 / keep); None: 1.
    Returns: normed [B, L, D] in `hidden`'s dtype, residual' [B, L, D] in at least float32.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    branch = hidden.to(wide)
    if branch_scale is not None:
        branch = branch * branch_scale.to(wide)[:, None, None]
    residual = branch if residual is None else residual + branch
    normed = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return normed.to(hidden.dtype), residual
