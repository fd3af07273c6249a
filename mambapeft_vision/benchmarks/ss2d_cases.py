"""Inputs and references that the tests of `ss2d` and its benchmark share."""

from typing import Any

import torch
import torch.nn.functional as F
from mambapeft_kernels import SS2DWeights, ss2d
from mambapeft_kernels.ss2d.api import DIRECTIONS
from mambapeft_kernels.ss2d.naive import reading_orders
from torch import Tensor


def make_weights(
    channels: int,
    states: int = 1,
    rank: int | None = None,
    optional: bool = True,
    decay: float = 0.0,
    step: float = -2.0,
    device: str = "cpu",
    seed: int = 0,
) -> SS2DWeights:
    """Random weights in float64: `decay` shifts A_logs (very negative: long memory), `step` is the mean dt bias."""
    gen = torch.Generator().manual_seed(seed)
    rank = max(1, channels // 32) if rank is None else rank

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(device)

    return SS2DWeights(
        x_proj_weight=draw(DIRECTIONS, rank + 2 * states, channels) / channels**0.5,
        dt_projs_weight=draw(DIRECTIONS, channels, rank) / rank**0.5,
        dt_projs_bias=draw(DIRECTIONS, channels) + step,
        A_logs=draw(DIRECTIONS * channels, states) / 2 + decay,
        Ds=draw(DIRECTIONS * channels),
        initial_states=draw(DIRECTIONS, channels, states) if optional else None,
        state_offset=draw(DIRECTIONS, channels, states) if optional else None,
    )


def make_map(batch: int, height: int, width: int, channels: int, device: str = "cpu", seed: int = 1) -> Tensor:
    """[B, H, W, E] float64."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(batch, height, width, channels, generator=gen, dtype=torch.float64).to(device)


def cast(weights: SS2DWeights, dtype: torch.dtype, grad: bool = True) -> SS2DWeights:
    """Fresh leaves of the weights in `dtype`."""
    fresh: list[Any] = [t if t is None else t.detach().to(dtype).requires_grad_(grad) for t in weights]
    return SS2DWeights(*fresh)


def results(
    u: Tensor, weights: SS2DWeights, dtype: torch.dtype, backend: str, weight_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output and every gradient for a fixed random output gradient; "plain" is `plain_ss2d`."""
    u = u.detach().to(dtype).requires_grad_()
    weights = cast(weights, weight_dtype or dtype)
    out = plain_ss2d(u, weights) if backend == "plain" else ss2d(u, weights, backend=backend)
    dout = output_gradient(out)
    leaves = {"u": u} | {name: t for name, t in zip(weights._fields, weights) if t is not None}
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **{f"d {name}": g for name, g in zip(leaves, grads)}}


def output_gradient(out: Tensor) -> Tensor:
    """The fixed gradient that `results` sends back."""
    gen = torch.Generator().manual_seed(2)
    return torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out.device, out.dtype)


def plain_ss2d(u: Tensor, w: SS2DWeights) -> Tensor:
    """Plain PyTorch as autocast runs the published code: products in u's dtype, scan in float32, outputs rounded."""
    batch, height, width, channels = u.shape
    states, rank = w.A_logs.shape[1], w.dt_projs_weight.shape[2]
    wide = torch.promote_types(u.dtype, torch.float32)
    tokens = u.reshape(batch, height * width, channels)
    total = torch.zeros_like(tokens)
    for k, order in enumerate(reading_orders(height, width, u.device)):
        x = tokens[:, order]
        dt, B, C = F.linear(x, w.x_proj_weight[k].to(u.dtype)).split([rank, states, states], dim=-1)
        raw = F.linear(dt, w.dt_projs_weight[k].to(u.dtype))
        delta = F.softplus(raw.to(wide) + w.dt_projs_bias[k].to(wide))
        A = -torch.exp(w.A_logs.to(wide).view(DIRECTIONS, channels, states)[k])
        h = torch.zeros(batch, channels, states, dtype=wide, device=u.device)
        h = h if w.initial_states is None else h + w.initial_states[k].to(wide)
        offset = 0 if w.state_offset is None else w.state_offset[k].to(wide)
        outputs = []
        for t in range(height * width):
            h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None].to(wide)
            outputs.append(((h + offset) * C[:, t, None].to(wide)).sum(-1))
        y = torch.stack(outputs, 1) + w.Ds.to(wide).view(DIRECTIONS, -1)[k] * x
        total = total.index_add(1, order, y.to(u.dtype))
    return total.view_as(u)
