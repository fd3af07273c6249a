"""A mixer's core computed through its modules, for mixers in whose modules other code takes part.

A kernel reads the weights of conv1d, x_proj and dt_proj and calls none of these modules. It would ignore an adapter of
another library around one of them, a hook, a mask or an offloaded weight; such a mixer therefore calls its modules.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from mambapeft_kernels import selective_scan
from torch import Tensor, nn


@dataclass(frozen=True)
class ModuleDirection:
    """One scan direction, as `mambapeft_kernels.Direction`, with modules where that has their weights."""

    conv1d: nn.Module  # [B, E, L + K - 1] → [B, E, L]
    x_proj: nn.Module  # [B, L, E] → [B, L, R + 2N]
    dt_proj: nn.Module  # [B, L, R] → [B, L, E]
    taps: int  # K
    A_log: Tensor  # [E, N]
    D: Tensor  # [E]
    state_offset: Tensor | None  # [E, N]
    output_offset: Tensor | None  # [E]
    reverse: bool


def mixer_through_modules(xz: Tensor, z: Tensor | None, directions: Sequence[ModuleDirection], scale: float) -> Tensor:
    """Computes the same as `mambapeft_kernels.ssm_mixer`, in plain PyTorch; derivatives of all orders exist.

    Args: see there. The modules get activations in their own dtype; scans are kept in at least float32.
    """
    x, gate = xz.chunk(2, dim=-1) if z is None else (xz, z)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros_like(x, dtype=wide)
    for direction in directions:
        ordered = x.flip(1) if direction.reverse else x
        y = _scan(ordered, direction, wide)
        total = total + (y.flip(1) if direction.reverse else y)
    return (scale * F.silu(gate.to(wide)) * total).to(x.dtype)


def _scan(x: Tensor, d: ModuleDirection, wide: torch.dtype) -> Tensor:
    """The ungated output [B, L, E] of one direction for tokens in its order."""
    u = F.silu(d.conv1d(F.pad(x.transpose(1, 2), (d.taps - 1, 0)))).transpose(1, 2)
    states, projected = d.A_log.shape[1], d.x_proj(u)
    dt, B, C = projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)
    delta = F.softplus(d.dt_proj(dt).to(wide))
    A = -torch.exp(d.A_log.to(wide))
    offsets = (None if t is None else t.to(wide) for t in (d.state_offset, d.output_offset))
    return selective_scan(u.to(wide), delta, A, B.to(wide), C.to(wide), d.D.to(wide), *offsets)


def announce(part: str, module: nn.Module) -> None:
    """Prints once for each kind of change that mixers compute through their modules, which is slower."""
    if not torch.compiler.is_compiling():
        kind = type(module)
        announce_once(part, f"{kind.__module__}.{kind.__qualname__}")


@cache
def announce_once(part: str, kind: str) -> None:
    """Warns that a mixer calls its modules one by one, once for each part and kind of module."""
    warnings.warn(
        f"{part} of a mixer has a hook, a forward of its own, or another module around it or in its place ({kind}); "
        f"the mixer calls it instead of running the fused kernel, which is right and slower",
        stacklevel=4,
    )
