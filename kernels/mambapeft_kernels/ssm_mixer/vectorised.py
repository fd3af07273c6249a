"""The mixer core in vectorised PyTorch, for CPUs (and any device without a fused backend).

One autograd node for the whole core. It keeps x, z, the ungated sum and one state in every few steps; the
convolution, Δ, B and C are recomputed in the backward. Only tensors that require a gradient get one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.causal_conv1d.naive import causal_conv_silu
from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients
from mambapeft_kernels.selective_scan.chunked import chunk_length, scan_backward, scan_forward
from mambapeft_kernels.selective_scan.exported import exported_as_operator
from mambapeft_kernels.ssm_mixer import naive
from mambapeft_kernels.ssm_mixer.api import Direction

_FIELDS = len(Direction._fields) - 1  # every field but `reverse` is a tensor or None


def ssm_mixer(x: Tensor, z: Tensor, directions: tuple[Direction, ...], scale: float) -> Tensor:
    """See `mambapeft_kernels.ssm_mixer`."""
    flat = [t for d in directions for t in d[:_FIELDS]]
    reverse = tuple(d.reverse for d in directions)
    with no_autocast(x.device.type):
        return _Mixer.apply(x, z, scale, reverse, *flat)


def _unflatten(flat: tuple[Any, ...], reverse: tuple[bool, ...]) -> list[Direction]:
    return [Direction._make((*flat[i * _FIELDS : (i + 1) * _FIELDS], r)) for i, r in enumerate(reverse)]


def _scan_inputs(x: Tensor, d: Direction) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, Δ [B, L, E], A [E, N], B, C [B, L, N] of one direction, in x's dtype."""
    states, rank = d.A_log.shape[1], d.dt_proj.shape[1]
    u = causal_conv_silu(x, d.conv_weight, d.conv_bias, d.reverse)
    dt, B, C = F.linear(u, d.x_proj).split([rank, states, states], dim=-1)
    delta = F.softplus(F.linear(dt, d.dt_proj, d.dt_bias))
    return u, delta, -torch.exp(d.A_log), B, C


def _time_major(tensors: list[Tensor], reverse: tuple[bool, ...]) -> Tensor:
    """[B, L, C] for each direction → [L, G, B, C], each direction in its own order of time."""
    return torch.stack([(t.flip(1) if r else t).transpose(0, 1) for t, r in zip(tensors, reverse)], dim=1)


def _batch_major(stacked: Tensor, reverse: tuple[bool, ...]) -> list[Tensor]:
    """The inverse of `_time_major`."""
    return [(t.flip(0) if r else t).transpose(0, 1) for t, r in zip(stacked.unbind(1), reverse)]


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, scale, reverse, *flat):
        wide = torch.promote_types(x.dtype, torch.float32)
        directions = _unflatten(tuple(t if t is None else t.to(wide) for t in flat), reverse)
        parts = [_scan_inputs(x.to(wide), d) for d in directions]
        u, delta, B, C = (_time_major([p[i] for p in parts], reverse) for i in (0, 1, 3, 4))
        A = torch.stack([p[2] for p in parts])
        steps = chunk_length(x.shape[1], len(directions), x.shape[0], x.shape[2], A.shape[-1])
        y, starts = scan_forward(u, delta, A, B, C, steps, exported_as_operator(ctx.needs_input_grad))
        total = torch.zeros_like(x, dtype=wide)
        for d, y_d, (u_d, _, _, _, C_d) in zip(directions, _batch_major(y, reverse), parts):
            total += y_d + d.D * u_d
            if d.state_offset is not None:
                total += C_d @ d.state_offset.T
            if d.output_offset is not None:
                total += d.output_offset
        ctx.save_for_backward(x, z, total, starts, *flat)
        ctx.scale, ctx.reverse, ctx.steps = scale, reverse, steps
        return (scale * F.silu(z.to(wide)) * total).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_out):
        x, z, _, _, *flat = ctx.saved_tensors
        if differentiated_again(grad_out):
            need_x, need_z, _, _, *need_flat = ctx.needs_input_grad

            def definition(x: Tensor, z: Tensor, *flat: Tensor | None) -> Tensor:
                return naive.ssm_mixer(x, z, tuple(_unflatten(flat, ctx.reverse)), ctx.scale)

            dx, dz, *dflat = plain_gradients(definition, (x, z, *flat), (need_x, need_z, *need_flat), grad_out)
            return dx, dz, None, None, *dflat
        with no_autocast(grad_out.device.type):
            return _Mixer._gradients(ctx, grad_out)

    @staticmethod
    def _gradients(ctx, grad_out):
        x, z, total, starts, *flat = ctx.saved_tensors
        wide, reverse = total.dtype, ctx.reverse
        need_x, need_z, _, _, *need_flat = ctx.needs_input_grad
        grad_out = grad_out.to(wide)
        sigmoid = torch.sigmoid(z.to(wide))
        dy = ctx.scale * grad_out * z.to(wide) * sigmoid
        dz = None
        if need_z:
            dz = (ctx.scale * grad_out * total * sigmoid * (1 + z.to(wide) * (1 - sigmoid))).to(z.dtype)
        if not need_x and not any(need_flat):
            return None, dz, None, None, *([None] * len(flat))

        with torch.enable_grad():
            # Leaves of the recomputed part: autograd differentiates the convolution and the projections.
            leaves = [
                None if t is None else t.detach().to(wide).requires_grad_(need) for t, need in zip(flat, need_flat)
            ]
            leaf_x = x.detach().to(wide).requires_grad_(need_x)
            directions = _unflatten(tuple(leaves), reverse)
            parts = [_scan_inputs(leaf_x, d) for d in directions]
        u, delta, B, C = (_time_major([p[i].detach() for p in parts], reverse) for i in (0, 1, 3, 4))
        A = torch.stack([p[2].detach() for p in parts])
        need_A = any(d.A_log.requires_grad for d in directions)
        dy_steps = _time_major([dy] * len(reverse), reverse)
        du, ddelta, dB, dC, dA = scan_backward(u, delta, A, B, C, starts, dy_steps, ctx.steps, need_A)

        outputs, grads = [], []
        direct: dict[int, Tensor] = {}  # gradients that do not pass through autograd, by position in `flat`
        split = zip(*(_batch_major(g, reverse) for g in (du, ddelta, dB, dC)))
        for i, (d, part, (du_d, ddelta_d, dB_d, dC_d)) in enumerate(zip(directions, parts, split)):
            du_d = du_d + dy * d.D.detach()
            if d.state_offset is not None:
                dC_d = dC_d + dy @ d.state_offset.detach()
            pairs = list(zip(part, (du_d, ddelta_d, None if dA is None else dA[i], dB_d, dC_d)))
            outputs += [t for t, g in pairs if t.requires_grad and g is not None]
            grads += [g for t, g in pairs if t.requires_grad and g is not None]
            needed = dict(zip(Direction._fields, need_flat[i * _FIELDS :]))
            place = {name: i * _FIELDS + k for k, name in enumerate(Direction._fields)}
            if needed["D"]:
                direct[place["D"]] = (dy * part[0].detach()).sum((0, 1))
            if needed["state_offset"]:
                direct[place["state_offset"]] = torch.einsum("ble,bln->en", dy, part[4].detach())
            if needed["output_offset"]:
                direct[place["output_offset"]] = dy.sum((0, 1))

        inputs = [t for t in (leaf_x, *leaves) if t is not None and t.requires_grad]
        found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True) if outputs else [None] * len(inputs)
        by_id = {id(t): g for t, g in zip(inputs, found)}
        dx = by_id.get(id(leaf_x))
        dflat = []
        for i, (leaf, t) in enumerate(zip(leaves, flat)):
            g = direct.get(i, None if leaf is None else by_id.get(id(leaf)))
            dflat.append(None if g is None else g.to(t.dtype))
        return None if dx is None else dx.to(x.dtype), dz, None, None, *dflat
