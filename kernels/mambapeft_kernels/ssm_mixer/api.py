"""The one public function of the mixer core, and its argument type."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mambapeft_kernels.backends import FUSED, resolve_backend


class Direction(NamedTuple):
    """The tensors of one scan direction. E channels, N states, R = dt_rank, K taps."""

    conv_weight: Tensor  # [E, K]
    conv_bias: Tensor  # [E]
    x_proj: Tensor  # [R + 2N, E], rows: dt | B | C
    dt_proj: Tensor  # [E, R]
    dt_bias: Tensor  # [E]
    A_log: Tensor  # [E, N], A = -exp(A_log)
    D: Tensor  # [E]
    state_offset: Tensor | None = None  # [E, N], added to the state where C reads it
    output_offset: Tensor | None = None  # [E], added to the output
    reverse: bool = False  # read the tokens from last to first


def ssm_mixer(
    x: Tensor, z: Tensor, directions: Sequence[Direction], scale: float = 0.5, backend: str = "auto"
) -> Tensor:
    """scale · silu(z) · Σ_d scan_d(x): what stands between in_proj and out_proj of a Vim block.

    For each direction d (Vim, arXiv 2401.09417, algorithm 1):
    u = silu(conv(x)); [dt | B | C] = u x_projᵀ; Δ = softplus(dt dt_projᵀ + dt_bias); y = scan(u, Δ, A, B, C, D).

    Args:
        x, z: [B, L, E] the two halves of in_proj's output (any strides).
        directions: one or two; both read the same x.
        scale: 0.5 averages the two directions.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: [B, L, E] in x's dtype. State, Δ and decay are kept in at least float32.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.
    """
    _check_shapes(x, z, directions)
    chosen = resolve_backend(backend, x.device, x.dtype)
    arguments = x, z, tuple(directions), scale
    # Imports wait until here: a backend's packages need not exist where another one runs.
    if chosen in FUSED:
        from mambapeft_kernels.ssm_mixer import fused

        return fused.run(*arguments, scans=chosen)
    if chosen == "mamba_ssm":
        from mambapeft_kernels.ssm_mixer import published as mamba_ssm

        return mamba_ssm.ssm_mixer(*arguments)
    if chosen == "torch":
        from mambapeft_kernels.ssm_mixer import vectorised as torch

        return torch.ssm_mixer(*arguments)
    from mambapeft_kernels.ssm_mixer import naive

    return naive.ssm_mixer(*arguments)


def _check_shapes(x: Tensor, z: Tensor, directions: Sequence[Direction]) -> None:
    if x.ndim != 3 or x.shape != z.shape:
        raise ValueError(
            f"ssm_mixer: x and z must be [B, L, E] of one shape, got {tuple(x.shape)} and {tuple(z.shape)}"
        )
    if not directions:
        raise ValueError("ssm_mixer: needs at least one Direction")
    if x.dtype != z.dtype:
        raise ValueError(f"ssm_mixer: x and z must have one dtype, got {x.dtype} and {z.dtype}; cast one of them")
    channels = x.shape[-1]
    for d in directions:
        states, rank = d.A_log.shape[1], d.dt_proj.shape[1]
        expected = {
            "conv_weight": (channels, d.conv_weight.shape[-1]),
            "conv_bias": (channels,),
            "x_proj": (rank + 2 * states, channels),
            "dt_proj": (channels, rank),
            "dt_bias": (channels,),
            "A_log": (channels, states),
            "D": (channels,),
            "state_offset": (channels, states),
            "output_offset": (channels,),
        }
        for name, shape in expected.items():
            tensor = getattr(d, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"ssm_mixer: {name} has shape {tuple(tensor.shape)}, expected {shape} for E={channels}"
                )
