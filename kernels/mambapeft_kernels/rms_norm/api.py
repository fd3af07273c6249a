"""The one public function of the residual norm."""

from torch import Tensor

from mambapeft_kernels.backends import FUSED, backend_for, computes_now
from mambapeft_kernels.rms_norm import naive


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    branch_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """residual' = residual + branch_scale · hidden;  normed = residual' / rms(residual') · weight.

    Args:
        hidden: [B, L, D] output of the previous mixer (or the embedded tokens).
        residual: [B, L, D] running sum, at least float32; None: it starts at `hidden`.
        weight: [D].
        branch_scale: [B] factor of each sample's branch (drop path: 0 or 1 / keep); None: 1.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: normed [B, L, D] in `hidden`'s dtype, residual' [B, L, D] in at least float32.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.
    """
    _check_shapes(hidden, residual, weight, branch_scale)
    chosen = backend_for(backend, hidden)
    if branch_scale is not None and branch_scale.requires_grad:
        chosen = "naive"  # kernels compute no gradient of a factor that is drawn, not learnt
    if chosen == "numba" and computes_now([hidden, residual, weight, branch_scale]):
        from mambapeft_kernels.rms_norm import compiled

        return compiled.add_rms_norm(hidden, residual, weight, eps, branch_scale)
    if chosen not in FUSED:
        return naive.add_rms_norm(hidden, residual, weight, eps, branch_scale)
    from mambapeft_kernels.rms_norm import triton_kernels as triton

    return triton.add_rms_norm(hidden, residual, weight, eps, branch_scale)


def _check_shapes(hidden: Tensor, residual: Tensor | None, weight: Tensor, branch_scale: Tensor | None) -> None:
    if hidden.ndim != 3:
        raise ValueError(f"add_rms_norm: hidden must be [B, L, D], got {tuple(hidden.shape)}")
    expected = {
        "residual": (residual, tuple(hidden.shape)),
        "weight": (weight, (hidden.shape[-1],)),
        "branch_scale": (branch_scale, (hidden.shape[0],)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"add_rms_norm: {name} has shape {tuple(tensor.shape)}, expected {shape} for hidden "
                f"{tuple(hidden.shape)}"
            )
