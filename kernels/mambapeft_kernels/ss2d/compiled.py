"""The two-dimensional selective scan in the loops that Numba compiles for the mixer, for CPUs.

Rows and columns are two sequences of the same map; each is scanned in both directions. PyTorch does the projections.
One autograd node keeps u and one state in every few steps of each direction; the rest is computed again.
"""

from typing import Any

import torch
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients
from mambapeft_kernels.numba_threads import over_batch
from mambapeft_kernels.ss2d import naive
from mambapeft_kernels.ss2d.api import DIRECTIONS, SS2DWeights
from mambapeft_kernels.ssm_mixer import numba_loops as loops


def ss2d(u: Tensor, weights: SS2DWeights) -> Tensor:
    """See `mambapeft_kernels.ss2d`."""
    with no_autocast("cpu"):
        return _SS2D.apply(u, *weights)


class _Direction:
    """One direction's sequence, weights and projections, as the loops read them."""

    def __init__(self, k: int, sequence: Tensor, w: SS2DWeights) -> None:
        channels = sequence.shape[-1]
        self.k, self.reverse, self.u = k, k >= 2, sequence  # [B, L, E]
        self.x_proj, self.dt_proj = w.x_proj_weight[k], w.dt_projs_weight[k]
        self.rank, self.states = w.dt_projs_weight.shape[2], w.A_logs.shape[1]
        self.A = -torch.exp(w.A_logs.view(DIRECTIONS, channels, -1)[k].T).contiguous()  # [N, E]
        self.D = w.Ds.view(DIRECTIONS, channels)[k].contiguous()
        self.dt_bias = w.dt_projs_bias[k].contiguous()
        initial = w.initial_states
        self.initial = torch.zeros_like(self.A) if initial is None else initial[k].T.contiguous()
        self.offset = None if w.state_offset is None else w.state_offset[k]  # [E, N]
        self.projected = sequence @ self.x_proj.T  # [B, L, R + 2N]
        self.dt_weight = self.dt_proj.T.contiguous()  # [R, E]

    def arrays(self) -> tuple[Any, ...]:
        """The arrays that both loops read."""
        given = (self.u, self.dt_weight, self.dt_bias, self.A, self.projected, self.D)
        return *(t.numpy() for t in given), self.reverse

    def scan(self, total: Tensor) -> Tensor:
        """Writes the outputs to `total` [B, L, E], or adds the reverse scan's; returns the kept states."""
        batch, length, channels = self.u.shape
        starts = self.u.new_empty(batch, -(-length // loops.CHUNK), self.states, channels)
        over_batch(loops.scan, batch, *self.arrays(), self.initial.numpy(), self.reverse, total.numpy(), starts.numpy())
        if self.offset is not None:
            total += self.projected[..., -self.states :] @ self.offset.T
        return starts

    def gradients(self, starts: Tensor, dy: Tensor, need: dict[str, bool], du_sum: Tensor) -> dict[str, Tensor]:
        """The gradients of this direction's weights; adds u's to `du_sum`."""
        batch, states = dy.shape[0], self.states
        du, draw, dprojected = torch.empty_like(dy), torch.empty_like(dy), torch.empty_like(self.projected)
        dA = dy.new_zeros(batch if need["A_logs"] else 0, *self.A.shape)
        dinitial = dy.new_empty(batch if need["initial_states"] else 0, *self.A.shape)
        dD, ddt_bias = dy.new_zeros(2, batch, dy.shape[2])
        given = (*self.arrays(), starts.numpy(), dy.numpy(), need["A_logs"], need["initial_states"])
        outputs = (du, draw, dprojected, dA, dD, ddt_bias, dinitial)
        over_batch(loops.scan_backward, batch, *given, *(t.numpy() for t in outputs))
        found: dict[str, Tensor] = {}
        if self.offset is not None:
            dprojected[..., -states:] += dy @ self.offset
            if need["state_offset"]:
                found["state_offset"] = _outer(dy, self.projected[..., -states:])
        if need["Ds"]:
            found["Ds"] = dD.sum(0)
        if need["A_logs"]:
            found["A_logs"] = (dA.sum(0) * self.A).T
        if need["initial_states"]:
            found["initial_states"] = dinitial.sum(0).T
        if need["dt_projs_bias"]:
            found["dt_projs_bias"] = ddt_bias.sum(0)
        if need["dt_projs_weight"]:
            found["dt_projs_weight"] = _outer(draw, self.projected[..., : self.rank])
        dprojected[..., : self.rank] = draw @ self.dt_proj
        if need["x_proj_weight"]:
            found["x_proj_weight"] = _outer(dprojected, self.u)
        if need["u"]:
            du_sum += du
            du_sum += dprojected @ self.x_proj
        return found


class _SS2D(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, *weights: Tensor | None) -> Tensor:
        sequences, w = _wide(u, weights)
        totals = [torch.empty_like(s) for s in sequences]
        starts = [_Direction(k, sequences[k % 2], w).scan(totals[k % 2]) for k in range(DIRECTIONS)]
        ctx.save_for_backward(u, *weights, *starts)
        return _in_map(totals, u)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if differentiated_again(dout):
            inputs = ctx.saved_tensors[:-DIRECTIONS]
            return tuple(plain_gradients(_definition, inputs, ctx.needs_input_grad, dout))
        with no_autocast("cpu"):
            return _SS2D._gradients(ctx, dout)

    @staticmethod
    def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        u, *kept = ctx.saved_tensors
        weights, starts = kept[:-DIRECTIONS], kept[-DIRECTIONS:]
        need = dict(zip(("u", *SS2DWeights._fields), ctx.needs_input_grad))
        sequences, w = _wide(u, weights)
        dys = _sequences(dout.to(sequences[0].dtype))
        du_sums = [torch.zeros_like(s) for s in sequences]
        found = [
            _Direction(k, sequences[k % 2], w).gradients(starts[k], dys[k % 2], need, du_sums[k % 2])
            for k in range(DIRECTIONS)
        ]
        grads: list[Tensor | None] = [_in_map(du_sums, u) if need["u"] else None]
        for name, original in zip(SS2DWeights._fields, weights):
            parts = [f[name] for f in found] if need[name] and original is not None else None
            grads.append(None if parts is None else torch.stack(parts).view(original.shape).to(original.dtype))
        return tuple(grads)


def _wide(u: Tensor, weights: tuple[Tensor | None, ...] | list[Tensor | None]) -> tuple[list[Tensor], SS2DWeights]:
    """u's two sequences and the weights, in at least float32."""
    wide = torch.promote_types(u.dtype, torch.float32)
    return _sequences(u.detach().to(wide)), SS2DWeights._make(weights).each(lambda t: t.detach().to(wide))


def _sequences(maps: Tensor) -> list[Tensor]:
    """[B, H, W, E] row by row and column by column, [B, L, E] each."""
    return [maps.flatten(1, 2).contiguous(), maps.transpose(1, 2).flatten(1, 2).contiguous()]


def _in_map(sequences: list[Tensor], u: Tensor) -> Tensor:
    """The sum of a sequence of rows and one of columns, [B, H, W, E] as u."""
    batch, height, width, channels = u.shape
    rows, columns = sequences
    total = rows.view(u.shape) + columns.view(batch, width, height, channels).transpose(1, 2)
    return total.to(u.dtype)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Σ over tokens of a bᵀ: [B, L, i] and [B, L, j] → [i, j]."""
    return a.flatten(0, 1).T @ b.flatten(0, 1)


def _definition(u: Tensor, *weights: Tensor | None) -> Tensor:
    return naive.ss2d(u, SS2DWeights(*weights))  # type: ignore[arg-type]  # the first five are never None
