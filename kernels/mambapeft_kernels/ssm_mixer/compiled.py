"""The mixer core in loops that Numba compiles, for CPUs.

PyTorch does x_proj and the gradients of both projections; convolution, dt_proj, scan, sum and gate are loops that read
every activation once. x, z, u, x_proj's output, the ungated sum and one state in every few steps are kept; Δ, decays
and the other states are computed again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients
from mambapeft_kernels.numba_threads import array, over_batch
from mambapeft_kernels.ssm_mixer import naive
from mambapeft_kernels.ssm_mixer import numba_loops as loops
from mambapeft_kernels.ssm_mixer.api import Direction, halves

_FIELDS = len(Direction._fields) - 1  # every field but `reverse` is a tensor or None
_KEPT = 3  # tensors of a direction for the backward: u [B, L, E], the projections [B, L, R + 2N], states of chunks


def ssm_mixer(xz: Tensor, z: Tensor | None, directions: tuple[Direction, ...], scale: float) -> Tensor:
    """See `mambapeft_kernels.ssm_mixer`."""
    flat = [t for d in directions for t in d[:_FIELDS]]
    keep = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (xz, z, *flat))
    with torch.autocast("cpu", enabled=False):
        return _Mixer.apply(xz, z, scale, keep, tuple(d.reverse for d in directions), *flat)


class _Loops(NamedTuple):
    """One direction's weights as the loops read them."""

    taps: np.ndarray  # [K, E]
    conv_bias: np.ndarray
    A: np.ndarray  # [N, E]
    D: np.ndarray
    dt_weight: np.ndarray  # [R, E]
    dt_bias: np.ndarray
    reverse: bool


def _loops_of(d: Direction) -> _Loops:
    return _Loops(
        array(d.conv_weight.T),
        array(d.conv_bias),
        array(-torch.exp(d.A_log.T)),
        array(d.D),
        array(d.dt_proj.T),
        array(d.dt_bias),
        d.reverse,
    )


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        xz: Tensor,
        z: Tensor | None,
        scale: float,
        keep: bool,
        reverse: tuple[bool, ...],
        *flat: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(xz.dtype, torch.float32)
        directions = _directions(flat, reverse, wide)
        x, gate, column = _inputs(xz, z, wide)
        batch, length, channels = xz.shape[0], xz.shape[1], directions[0].D.shape[0]
        total = torch.empty(batch, length, channels, dtype=wide)
        kept = []
        for i, d in enumerate(directions):
            w = _loops_of(d)
            u = torch.empty(batch, length, channels, dtype=wide)
            over_batch(loops.convolve, batch, x, w.taps, w.conv_bias, w.reverse, u.numpy())
            projected = u @ d.x_proj.T
            starts = torch.empty(
                batch if keep else 0, -(-length // loops.CHUNK), d.A_log.shape[1], channels, dtype=wide
            )
            arrays = (u.numpy(), w.dt_weight, w.dt_bias, w.A, projected.numpy(), w.D, w.reverse, np.zeros_like(w.A))
            over_batch(loops.scan, batch, *arrays, i > 0, total.numpy(), starts.numpy())
            if keep:
                kept += [u, projected, starts]
            if d.state_offset is not None:
                total += projected[..., -d.A_log.shape[1] :] @ d.state_offset.T
            if d.output_offset is not None:
                total += d.output_offset
        out = torch.empty_like(total)
        over_batch(loops.gate, batch, total.numpy(), gate, column, _scalar(scale, wide), out.numpy())
        if keep:
            ctx.save_for_backward(xz, z, total, *kept, *flat)
        ctx.scale, ctx.reverse = scale, reverse
        return out.to(xz.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        if differentiated_again(dout):
            xz, z, _, *rest = ctx.saved_tensors
            need_xz, need_z, _, _, _, *need_flat = ctx.needs_input_grad

            def definition(xz: Tensor, z: Tensor | None, *flat: Any) -> Tensor:
                size, reverse = _FIELDS, ctx.reverse
                own = tuple(Direction._make((*flat[i * size : (i + 1) * size], r)) for i, r in enumerate(reverse))
                return naive.ssm_mixer(*halves(xz, z), own, ctx.scale)

            inputs, need = (xz, z, *rest[_KEPT * len(ctx.reverse) :]), (need_xz, need_z, *need_flat)
            dxz, dz, *dflat = plain_gradients(definition, inputs, need, dout)
            return dxz, dz, None, None, None, *dflat
        with no_autocast("cpu"):
            return _Mixer._gradients(ctx, dout)

    @staticmethod
    def _gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        xz, z, total, *rest = ctx.saved_tensors
        kept, flat = rest[: _KEPT * len(ctx.reverse)], rest[_KEPT * len(ctx.reverse) :]
        wide, batch = total.dtype, total.shape[0]
        need_xz, need_z, _, _, _, *need_flat = ctx.needs_input_grad
        directions = _directions(flat, ctx.reverse, wide)
        x, gate, column = _inputs(xz, z, wide)
        # dx and dz share a buffer where x and z do.
        dxz = torch.empty(xz.shape, dtype=wide) if need_xz else torch.empty(1, 1, 1, dtype=wide)
        dz = dxz if z is None else torch.empty(z.shape if need_z else (1, 1, 1), dtype=wide)
        dy = torch.empty_like(total)
        over_batch(
            loops.gate_backward,
            batch,
            *(total.numpy(), gate, column, _scalar(ctx.scale, wide), array(dout.to(wide))),
            *(need_xz if z is None else need_z, dy.numpy(), dz.numpy(), column),
        )
        grads: list[Tensor | None] = []
        for i, d in enumerate(directions):
            needs = dict(zip(Direction._fields, need_flat[i * _FIELDS : (i + 1) * _FIELDS]))
            if need_xz or any(needs.values()):
                found = _backward_of(
                    d, x, dy, kept[i * _KEPT : (i + 1) * _KEPT], needs, dxz if need_xz else None, i > 0
                )
            else:
                found = {}
            grads += [
                None if found.get(name) is None else found[name].to(original.dtype)
                for name, original in zip(Direction._fields, flat[i * _FIELDS : (i + 1) * _FIELDS])
            ]
        return dxz.to(xz.dtype) if need_xz else None, dz.to(z.dtype) if need_z else None, None, None, None, *grads


def _backward_of(
    d: Direction,
    x: np.ndarray,
    dy: Tensor,
    kept: Sequence[Tensor],
    needs: dict[str, bool],
    dx: Tensor | None,
    add: bool,
) -> dict[str, Tensor]:
    """One direction's gradients by field; writes (or adds to) dx."""
    wide, (batch, _, channels), states = dy.dtype, dy.shape, d.A_log.shape[1]
    w = _loops_of(d)
    u, projected, starts = kept
    rank = d.dt_proj.shape[1]
    du, draw, dprojected = torch.empty_like(u), torch.empty_like(u), torch.empty_like(projected)
    dA = torch.zeros(batch if needs["A_log"] else 0, states, channels, dtype=wide)
    dD, ddt_bias = torch.zeros(2, batch, channels, dtype=wide)
    arrays = (u.numpy(), w.dt_weight, w.dt_bias, w.A, projected.numpy(), w.D, w.reverse, starts.numpy(), dy.numpy())
    needed = (needs["A_log"], False)  # the state before the first step is zero
    outputs = (du, draw, dprojected, dA, dD, ddt_bias, dA[:0])
    over_batch(loops.scan_backward, batch, *arrays, *needed, *(t.numpy() for t in outputs))
    found: dict[str, Tensor] = {}
    flat_dy = dy.flatten(0, 1)
    if d.state_offset is not None:
        dprojected[..., -states:] += dy @ d.state_offset
        if needs["state_offset"]:
            found["state_offset"] = flat_dy.T @ projected[..., -states:].flatten(0, 1)
    if needs["output_offset"]:
        found["output_offset"] = flat_dy.sum(0)
    if needs["D"]:
        found["D"] = dD.sum(0)
    if needs["A_log"]:
        found["A_log"] = dA.sum(0).T * -torch.exp(d.A_log)
    if needs["dt_bias"]:
        found["dt_bias"] = ddt_bias.sum(0)
    if needs["dt_proj"]:
        found["dt_proj"] = draw.flatten(0, 1).T @ projected[..., :rank].flatten(0, 1)
    dprojected[..., :rank] = draw @ d.dt_proj
    if needs["x_proj"]:
        found["x_proj"] = dprojected.flatten(0, 1).T @ u.flatten(0, 1)
    need_weight = needs["conv_weight"] or needs["conv_bias"]
    if dx is None and not need_weight:
        return found
    du.view(-1, channels).addmm_(dprojected.flatten(0, 1), d.x_proj)
    rows = batch if need_weight else 0
    dweight = torch.zeros(rows, d.conv_weight.shape[1], channels, dtype=wide)
    dbias = torch.zeros(rows, channels, dtype=wide)
    into = torch.empty(1, 1, 1, dtype=wide) if dx is None else dx
    over_batch(
        loops.convolve_backward,
        batch,
        *(x, w.taps, w.conv_bias, w.reverse, du.numpy(), dx is not None, need_weight, add),
        *(into.numpy(), dweight.numpy(), dbias.numpy()),
    )
    if need_weight:
        found["conv_weight"], found["conv_bias"] = dweight.sum(0).T, dbias.sum(0)
    return {name: grad for name, grad in found.items() if needs[name]}


def _directions(
    flat: tuple[Tensor | None, ...] | list[Tensor | None], reverse: tuple[bool, ...], wide: torch.dtype
) -> list[Direction]:
    tensors: list[Any] = [None if t is None else t.detach().to(wide) for t in flat]
    return [Direction._make((*tensors[i * _FIELDS : (i + 1) * _FIELDS], r)) for i, r in enumerate(reverse)]


def _inputs(xz: Tensor, z: Tensor | None, wide: torch.dtype) -> tuple[np.ndarray, np.ndarray, int]:
    """The buffer that starts with x, the buffer with the gate, and the gate's first column there."""
    x = array(xz.to(wide))
    return (x, x, xz.shape[-1] // 2) if z is None else (x, array(z.to(wide)), 0)


def _scalar(value: float, wide: torch.dtype) -> np.floating:
    return np.float32(value) if wide == torch.float32 else np.float64(value)
