"""The public functions of LayerNorm."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.backends import FUSED, backend_for
from mambapeft_kernels.layer_norm import naive


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """(x - mean(x)) / √(var(x) + eps) · weight + bias over the last dimension (arXiv 1607.06450).

    Args:
        x: [..., D], any floating dtype. weight, bias: [D].
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: [..., D] in x's dtype; statistics are computed in at least float32.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.
    """
    _check_shapes("layer_norm", x, {"weight": (weight, x.shape[-1:]), "bias": (bias, x.shape[-1:])})
    chosen = backend_for(backend, x)
    if chosen in ("torch", "numba"):  # Numba has no such loops
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)
    if chosen not in FUSED:
        return naive.layer_norm(x, weight, bias, eps)
    from mambapeft_kernels.layer_norm import triton_kernels as triton

    return triton.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    branch_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """residual' = residual + branch_scale · hidden;  normed = LayerNorm(residual').

    Args:
        hidden: [B, ..., D] output of a branch. residual: [B, ..., D] running sum in at least float32; None: zero.
        weight, bias: [D]. branch_scale: [B], the branch's drop-path factor of each sample (0 or 1 / keep); None: 1.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: normed [B, ..., D] in `hidden`'s dtype, residual' [B, ..., D] in at least float32.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.
    """
    expected = {
        "residual": (residual, hidden.shape),
        "weight": (weight, hidden.shape[-1:]),
        "bias": (bias, hidden.shape[-1:]),
        "branch_scale": (branch_scale, hidden.shape[:1]),
    }
    _check_shapes("add_layer_norm", hidden, expected)
    chosen = backend_for(backend, hidden)
    if chosen in ("torch", "numba"):  # Numba has no such loops
        residual = naive.add_branch(hidden, residual, branch_scale)
        return layer_norm(residual, weight, bias, eps, chosen).to(hidden.dtype), residual
    if chosen not in FUSED:
        return naive.add_layer_norm(hidden, residual, weight, bias, eps, branch_scale)
    from mambapeft_kernels.layer_norm import triton_kernels as triton

    return triton.add_layer_norm(hidden, residual, weight, bias, eps, branch_scale)


def add_branch(
    hidden: Tensor,
    residual: Tensor,
    branch_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + branch_scale · hidden, the residual' of `add_layer_norm`, rounded once to `dtype`.

    Args:
        hidden, residual, branch_scale, backend: as in `add_layer_norm`.
        dtype: of the result; None: the sum's own, at least float32.
    Raises: as `add_layer_norm`.
    """
    expected = {"residual": (residual, hidden.shape), "branch_scale": (branch_scale, hidden.shape[:1])}
    _check_shapes("add_branch", hidden, expected)
    dtype = torch.promote_types(residual.dtype, torch.float32) if dtype is None else dtype
    if backend_for(backend, hidden) not in FUSED:
        return naive.add_branch(hidden, residual, branch_scale).to(dtype)
    from mambapeft_kernels.layer_norm import triton_sum

    return triton_sum.add_branch(hidden, residual, branch_scale, dtype)


def _check_shapes(op: str, x: Tensor, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    if x.ndim < 2:
        raise ValueError(f"{op}: expected at least [B, D], got {tuple(x.shape)}")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} for {tuple(x.shape)}"
            )
