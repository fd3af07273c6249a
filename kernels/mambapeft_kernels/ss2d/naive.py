"""The definition of the two-dimensional selective scan; plain autograd, any dtype, exact in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.ss2d.api import DIRECTIONS, SS2DWeights


def reading_orders(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """[4, L]: the place row·W + column in the map that each direction reads at each step."""
    places = torch.arange(height * width, device=device)
    rows, columns = places, places.view(height, width).T.reshape(-1)
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def ss2d(u: Tensor, weights: SS2DWeights) -> Tensor:
    """See `mambapeft_kernels.ss2d`."""
    batch, height, width, channels = u.shape
    tokens = u.reshape(batch, height * width, channels).to(_wide(u))
    y = torch.zeros_like(tokens)
    for k, order in enumerate(reading_orders(height, width, u.device)):
        outputs, _ = scan(tokens[:, order], k, weights)
        y = y + outputs[:, order.argsort()]  # as index_add, which the exporter of ONNX translates wrongly
    return y.reshape(u.shape).to(u.dtype)


def prefix_states(tokens: Tensor, weights: SS2DWeights) -> Tensor:
    """See `mambapeft_kernels.prefix_states`."""
    wide = tokens.to(_wide(tokens))
    return torch.stack([scan(wide[k, None], k, weights)[1][0] for k in range(DIRECTIONS)])


def scan(u: Tensor, k: int, weights: SS2DWeights) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, E] and last state [B, E, N] of direction k on its sequence u [B, L, E]."""
    batch, length, channels = u.shape
    w = weights.each(lambda t: t.to(u.dtype))
    states, rank = w.A_logs.shape[1], w.dt_projs_weight.shape[2]
    dt, B, C = (u @ w.x_proj_weight[k].T).split([rank, states, states], dim=-1)
    delta = F.softplus(dt @ w.dt_projs_weight[k].T + w.dt_projs_bias[k])
    A = -torch.exp(w.A_logs.view(DIRECTIONS, channels, states)[k])
    D = w.Ds.view(DIRECTIONS, channels)[k]
    h = u.new_zeros(batch, channels, states)
    if w.initial_states is not None:
        h = h + w.initial_states[k]
    outputs = []
    for t in range(length):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        read = h if w.state_offset is None else h + w.state_offset[k]
        outputs.append((read * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u), h


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
