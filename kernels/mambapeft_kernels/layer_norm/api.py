"""The public functions of LayerNorm."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.backends import FUSED, backend_for
from mambapeft_kernels.layer_norm import naive


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    backend: str = "auto",
    shift: Tensor | None = None,
) -> Tensor:
    """(x - mean(x)) / √(var(x) + eps) · weight + bias over the last dimension (arXiv 1607.06450).

    Args:
        x: [..., D], any floating dtype. weight, bias: [D].
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
        shift: [D], added to x first, such as the bias of the map before; a sum of its own where a vector trains.
    Returns: [..., D] in x's dtype; statistics are computed in at least float32.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.
    """
    vectors = {"weight": weight, "bias": bias, "shift": shift}
    check_shapes("layer_norm", x, {name: (t, x.shape[-1:]) for name, t in vectors.items()})
    chosen = backend_for(backend, x)
    if chosen in ("torch", "numba"):  # Numba has no such loops
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.to(wide) if shift is None else x.to(wide) + shift
        return F.layer_norm(total, x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)
    if chosen not in FUSED:
        return naive.layer_norm(x, weight, bias, eps, shift)
    from mambapeft_kernels.layer_norm import triton_kernels as triton

    return triton.layer_norm(x, weight, bias, eps, shift)


def add_layer_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    branch_scale: Tensor | None = None,
    backend: str = "auto",
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """residual' = residual + branch_scale · hidden;  normed = LayerNorm(residual').

    Args:
        hidden: [B, ..., D] output of a branch. residual: [B, ..., D] running sum in at least float32 (with `narrow`
            also in `hidden`'s dtype); None: zero.
        weight, bias: [D]. branch_scale: [B], the branch's drop-path factor of each sample (0 or 1 / keep); None: 1.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
        narrow: residual' is rounded to `hidden`'s dtype once it is normed; a third of the bytes less, for inference.
    Returns: normed [B, ..., D] in `hidden`'s dtype, residual' [B, ..., D] in at least float32 unless `narrow`.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.
    """
    expected = {
        "residual": (residual, hidden.shape),
        "weight": (weight, hidden.shape[-1:]),
        "bias": (bias, hidden.shape[-1:]),
        "branch_scale": (branch_scale, hidden.shape[:1]),
    }
    check_shapes("add_layer_norm", hidden, expected)
    chosen = backend_for(backend, hidden)
    if chosen in ("torch", "numba"):  # Numba has no such loops
        total = naive.add_branch(hidden, residual, branch_scale)
        normed = layer_norm(total, weight, bias, eps, chosen).to(hidden.dtype)
        return normed, total.to(hidden.dtype) if narrow else total
    if chosen not in FUSED:
        return naive.add_layer_norm(hidden, residual, weight, bias, eps, branch_scale, narrow)
    from mambapeft_kernels.layer_norm import triton_kernels as triton

    return triton.add_layer_norm(hidden, residual, weight, bias, eps, branch_scale, narrow)


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
    check_shapes("add_branch", hidden, expected)
    dtype = torch.promote_types(residual.dtype, torch.float32) if dtype is None else dtype
    if backend_for(backend, hidden) not in FUSED:
        return naive.add_branch(hidden, residual, branch_scale).to(dtype)
    from mambapeft_kernels.layer_norm import triton_sum

    return triton_sum.add_branch(hidden, residual, branch_scale, dtype)


def check_shapes(op: str, x: Tensor, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    if x.ndim < 2:
        raise ValueError(f"{op}: expected at least [B, D], got {tuple(x.shape)}")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} for {tuple(x.shape)}"
            )
