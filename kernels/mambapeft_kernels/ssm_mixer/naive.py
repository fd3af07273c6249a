"""The definition of the mixer core, composed from the definitions of its parts; plain autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.causal_conv1d.naive import causal_conv_silu
from mambapeft_kernels.selective_scan.naive import selective_scan
from mambapeft_kernels.ssm_mixer.api import Direction


def ssm_mixer(x: Tensor, z: Tensor, directions: tuple[Direction, ...], scale: float) -> Tensor:
    """See `mambapeft_kernels.ssm_mixer`. Computes in at least float32 throughout."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total: Tensor | float = 0.0
    for direction in directions:
        d = Direction._make(t.to(wide) if isinstance(t, Tensor) else t for t in direction)
        states, rank = d.A_log.shape[1], d.dt_proj.shape[1]
        u = causal_conv_silu(x.to(wide), d.conv_weight, d.conv_bias, d.reverse)
        dt, B, C = (u @ d.x_proj.T).split([rank, states, states], dim=-1)
        delta = F.softplus(dt @ d.dt_proj.T + d.dt_bias)
        total = total + selective_scan(
            u, delta, -torch.exp(d.A_log), B, C, d.D, d.reverse, d.state_offset, d.output_offset
        )
    return (scale * F.silu(z.to(wide)) * total).to(x.dtype)
