"""The mixer core on the published kernels of mamba-ssm and causal-conv1d: for comparison, not for speed.

These kernels read [B, E, L], one direction at a time and forwards, and always compute every gradient. So this backend
pays for transposes and flips, as the reference implementation does.
"""

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from mambapeft_kernels.derivatives import first_order_only
from mambapeft_kernels.ssm_mixer.api import Direction


def ssm_mixer(x: Tensor, z: Tensor, directions: tuple[Direction, ...], scale: float) -> Tensor:
    """See `mambapeft_kernels.ssm_mixer`."""
    with torch.autocast(x.device.type, enabled=False):
        outputs = [_direction(x, d) for d in directions]
        total = first_order_only(torch.stack(outputs).sum(0), "choose kernel=torch or kernel=naive")
        return (scale * F.silu(z.float()) * total).to(x.dtype)


def _direction(x: Tensor, d: Direction) -> Tensor:
    """The ungated output of one direction, [B, L, E] float32."""
    states, rank = d.A_log.shape[1], d.dt_proj.shape[1]
    io = x.dtype
    x = (x.flip(1) if d.reverse else x).transpose(1, 2).contiguous()
    u = causal_conv1d_fn(x, d.conv_weight.to(io), d.conv_bias.to(io), activation="silu")
    dt, B, C = F.linear(u.transpose(1, 2), d.x_proj.to(io)).split([rank, states, states], dim=-1)
    delta = F.linear(dt, d.dt_proj.to(io)).transpose(1, 2).contiguous()
    B, C = (t.transpose(1, 2).contiguous() for t in (B, C))
    A = -torch.exp(d.A_log.float())
    y = selective_scan_fn(u, delta, A, B, C, d.D.float(), None, d.dt_bias.float(), delta_softplus=True)
    y = y.transpose(1, 2).float()
    if d.state_offset is not None:
        y = y + C.transpose(1, 2).float() @ d.state_offset.float().T
    if d.output_offset is not None:
        y = y + d.output_offset.float()
    return y.flip(1) if d.reverse else y
