"""The one public function of the mixer core, and its argument type."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mambapeft_kernels.backends import FUSED, backend_for, computes_now


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
    xz: Tensor,
    directions: Sequence[Direction],
    scale: float = 0.5,
    backend: str = "auto",
    *,
    z: Tensor | None = None,
) -> Tensor:
    """scale · silu(z) · Σ_d scan_d(x): the part of a Vim block between in_proj and out_proj.

    For each direction d (Vim, arXiv 2401.09417, algorithm 1):
    u = silu(conv(x)); [dt | B | C] = u x_projᵀ; Δ = softplus(dt dt_projᵀ + dt_bias); y = scan(u, Δ, A, B, C, D).

    Args:
        xz: [B, L, 2E] the output of in_proj, x and z side by side (any strides); with `z` given: x alone, [B, L, E].
        directions: one or two; both read the same x.
        scale: 0.5 averages the two directions.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
        z: [B, L, E], where the gate is no half of in_proj's output.
    Returns: [B, L, E] in x's dtype. State, Δ and decay are kept in at least float32.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.

    Example:
        >>> forward = Direction(torch.randn(8, 4), torch.zeros(8), torch.randn(5, 8), torch.randn(8, 3),
        ...                     torch.zeros(8), torch.zeros(8, 1), torch.ones(8))     # E = 8, R = 3, N = 1, K = 4
        >>> backward = forward._replace(reverse=True)
        >>> ssm_mixer(torch.randn(2, 10, 16), (forward, backward)).shape
        torch.Size([2, 10, 8])
    """
    _check_shapes(xz, z, directions)
    chosen = backend_for(backend, xz)
    directions = tuple(directions)
    # Imports wait until here: a backend's packages need not exist where another one runs.
    if chosen in FUSED:
        from mambapeft_kernels.ssm_mixer import fused

        return fused.run(xz, z, directions, scale, chosen)
    if chosen == "numba" and not computes_now([xz, z, *(t for d in directions for t in d[:-1])]):
        chosen = "torch"  # a traced (compiled, exported) program consists of PyTorch's operations
    if chosen == "numba":
        from mambapeft_kernels.ssm_mixer import compiled

        return compiled.ssm_mixer(xz, z, directions, scale)
    x, gate = halves(xz, z)
    if chosen == "mamba_ssm":
        from mambapeft_kernels.ssm_mixer import published

        return published.ssm_mixer(x, gate, directions, scale)
    if chosen == "torch":
        from mambapeft_kernels.ssm_mixer import vectorised

        return vectorised.ssm_mixer(x, gate, directions, scale)
    from mambapeft_kernels.ssm_mixer import naive

    return naive.ssm_mixer(x, gate, directions, scale)


def halves(xz: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """x and the gate, [B, L, E] each, without copies."""
    if z is not None:
        return xz, z
    x, gate = xz.chunk(2, dim=-1)
    return x, gate


def _check_shapes(xz: Tensor, z: Tensor | None, directions: Sequence[Direction]) -> None:
    if z is None:
        if xz.ndim != 3 or xz.shape[-1] % 2:
            raise ValueError(f"ssm_mixer: xz must be [B, L, 2E], got {tuple(xz.shape)}; for x alone give z too")
    elif xz.ndim != 3 or xz.shape != z.shape:
        raise ValueError(
            f"ssm_mixer: x and z must be [B, L, E] of one shape, got {tuple(xz.shape)} and {tuple(z.shape)}"
        )
    if not directions:
        raise ValueError("ssm_mixer: needs at least one Direction")
    if z is not None and xz.dtype != z.dtype:
        raise ValueError(f"ssm_mixer: x and z must have one dtype, got {xz.dtype} and {z.dtype}; cast one of them")
    channels = xz.shape[-1] // 2 if z is None else xz.shape[-1]
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
