"""The two-dimensional selective scan in vectorised PyTorch, for CPUs (and any device without a fused backend).

All four directions take each step together; only h_t = a_t h_{t-1} + b_t is a loop. One autograd node keeps u, the
projections and the states at the start of every chunk of steps; Δ, decays and states are computed again in the
backward, one chunk at a time, so memory is O(L / T + T) states. Tensors of a chunk are [T, 4, B, ...].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, exporting, no_autocast, plain_gradients
from mambapeft_kernels.selective_scan.chunked import run_states
from mambapeft_kernels.selective_scan.exported import exported_as_operator, scan_outputs
from mambapeft_kernels.ss2d import naive
from mambapeft_kernels.ss2d.api import DIRECTIONS, SS2DWeights
from mambapeft_kernels.ss2d.naive import reading_orders

# A chunk's largest tensor holds about this many elements: it stays in a core's caches.
CHUNK_ELEMENTS = 1 << 18


def ss2d(u: Tensor, weights: SS2DWeights) -> Tensor:
    """See `mambapeft_kernels.ss2d`."""
    with no_autocast(u.device.type):
        return _SS2D.apply(u, *weights)


@dataclass
class _Chunk:
    """The tensors of a few steps: decays and states are [T, 4, B, N, E], the rest [T, 4, B, ...]."""

    places: Tensor  # [T, 4], where each direction reads
    u: Tensor  # E
    low: Tensor  # R, δ
    B: Tensor  # N
    C: Tensor  # N
    delta: Tensor  # E
    decay: Tensor
    states: Tensor


class _Sequence:
    """u and its projections as the four directions read them."""

    def __init__(self, u: Tensor, w: SS2DWeights) -> None:
        batch, height, width, channels = u.shape
        self.w, self.states, self.rank = w, w.A_logs.shape[1], w.dt_projs_weight.shape[2]
        self.tokens = u.reshape(batch, height * width, channels).transpose(0, 1)  # [L, B, E]
        self.proj = F.linear(self.tokens, w.x_proj_weight.flatten(0, 1)).unflatten(-1, (DIRECTIONS, -1))
        self.places = reading_orders(height, width, u.device).T  # [L, 4]
        self.directions = torch.arange(DIRECTIONS, device=u.device)
        self.At = -torch.exp(w.A_logs.view(DIRECTIONS, channels, -1)).mT[:, None]  # [4, 1, N, E]
        per_step = DIRECTIONS * batch * channels * self.states
        fits = max(8, min(height * width, CHUNK_ELEMENTS // max(1, per_step)))
        # In an exported model the number of chunks may not depend on the batch, which may be dynamic.
        self.steps = height * width if exporting() else fits

    def ranges(self) -> list[slice]:
        """The steps of each chunk."""
        length = self.places.shape[0]
        return [slice(s, min(length, s + self.steps)) for s in range(0, length, self.steps)]

    def first_state(self) -> Tensor:
        """[4, B, N, E] before the first step."""
        _, batch, channels = self.tokens.shape
        h = self.tokens.new_zeros(DIRECTIONS, batch, self.states, channels)
        return h if self.w.initial_states is None else h + self.w.initial_states.mT[:, None]

    def inputs(self, places: Tensor) -> tuple[Tensor, ...]:
        """u, low, B, C and Δ at some steps' places [T, 4]."""
        u = _read(self.tokens, (places,))
        proj = _read(self.proj, (places, slice(None), self.directions))
        low, B, C = proj.split([self.rank, self.states, self.states], dim=-1)
        raw = low @ self.w.dt_projs_weight.mT + self.w.dt_projs_bias[:, None]
        return u, low, B, C, F.softplus(raw)

    def chunk(self, steps: slice, h: Tensor) -> _Chunk:
        """The chunk's tensors; `h` is the state before it."""
        places = self.places[steps]
        u, low, B, C, delta = self.inputs(places)
        decay = (delta.unsqueeze(-2) * self.At).exp_()
        states = (delta * u).unsqueeze(-2) * B.unsqueeze(-1)
        states = run_states(decay, states, h)
        return _Chunk(places, u, low, B, C, delta, decay, states)

    def read_states(self, states: Tensor) -> Tensor:
        """The states as C reads them, with the offset."""
        offset = self.w.state_offset
        return states if offset is None else states + offset.mT[:, None]


class _SS2D(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, *weights):
        sequence = _sequence(u, weights)
        y = sequence.tokens * sequence.w.Ds.view(DIRECTIONS, -1).sum(0)
        h, starts = sequence.first_state(), []
        if exported_as_operator(ctx.needs_input_grad):
            return _in_map(y + _exported_outputs(sequence, h), u)
        for steps in sequence.ranges():
            starts.append(h)
            chunk = sequence.chunk(steps, h)
            h = chunk.states[-1].clone()
            outputs = (chunk.C.unsqueeze(-2) @ sequence.read_states(chunk.states)).squeeze(-2)
            if exporting():  # one chunk; ONNX's exporter translates index_add_ wrongly
                return _in_map(y + _taken_back(outputs, sequence), u)
            for k in range(DIRECTIONS):
                y.index_add_(0, chunk.places[:, k], outputs[:, k])
        ctx.save_for_backward(u, *weights, *starts)
        return _in_map(y, u)

    @staticmethod
    def backward(ctx, dout):
        if differentiated_again(dout):
            inputs = ctx.saved_tensors[: len(SS2DWeights._fields) + 1]
            return tuple(plain_gradients(_definition, inputs, ctx.needs_input_grad, dout))
        with no_autocast(dout.device.type):
            return _SS2D._gradients(ctx, dout)

    @staticmethod
    def _gradients(ctx, dout):
        count = len(SS2DWeights._fields)
        u, *kept = ctx.saved_tensors
        weights, starts = kept[:count], kept[count:]
        need = dict(zip(SS2DWeights._fields, ctx.needs_input_grad[1:]))
        s = _sequence(u, weights)
        w, At = s.w, s.At
        dy_map = dout.to(s.tokens.dtype).flatten(1, 2).transpose(0, 1)  # [L, B, E]
        du_map = dy_map * w.Ds.view(DIRECTIONS, -1).sum(0)
        dproj_map = torch.empty_like(s.proj)
        carry = torch.zeros_like(s.first_state())  # a_{t+1} g_{t+1}
        dA, doffset = torch.zeros_like(At[:, 0]), torch.zeros_like(At[:, 0])
        dweight, dbias = torch.zeros_like(w.dt_projs_weight), torch.zeros_like(w.dt_projs_bias)
        for steps, start in zip(reversed(s.ranges()), reversed(starts)):
            c = s.chunk(steps, start)
            dy = _read(dy_map, (c.places,))
            dC = (s.read_states(c.states) @ dy.unsqueeze(-1)).squeeze(-1)
            adjoint = dy.unsqueeze(-2) * c.C.unsqueeze(-1)  # becomes g_t
            for t in reversed(range(len(c.places))):
                adjoint[t] += carry
                carry = c.decay[t] * adjoint[t]
            gB = (c.B.unsqueeze(-2) @ adjoint).squeeze(-2)
            dB = (adjoint @ (c.delta * c.u).unsqueeze(-1)).squeeze(-1)
            before = torch.cat([start[None], c.states[:-1]])
            passed = adjoint.mul_(c.decay).mul_(before)  # g_t a_t h_{t-1}
            ddelta = c.u * gB + (passed * At).sum(-2)
            draw = ddelta * -torch.expm1(-c.delta)  # softplus' = 1 - e^-Δ
            dproj_map[c.places, :, s.directions] = torch.cat([draw @ w.dt_projs_weight, dB, dC], dim=-1)
            du = c.delta * gB
            for k in range(DIRECTIONS):
                du_map.index_add_(0, c.places[:, k], du[:, k])
            if need["A_logs"]:
                dA += torch.einsum("tkbne,tkbe->kne", passed, c.delta)
            if need["state_offset"]:
                doffset += torch.einsum("tkbe,tkbn->kne", dy, c.C)
            if need["dt_projs_weight"]:
                dweight += torch.einsum("tkbe,tkbr->ker", draw, c.low)
            if need["dt_projs_bias"]:
                dbias += draw.sum((0, 2))
        if ctx.needs_input_grad[0]:
            du_map += dproj_map.flatten(2) @ w.x_proj_weight.flatten(0, 1)
        found = {
            "dt_projs_weight": dweight,
            "dt_projs_bias": dbias,
            "A_logs": (dA * At[:, 0]).mT.flatten(0, 1),
            "initial_states": carry.sum(1).mT,
            "state_offset": doffset.mT,
        }
        if need["x_proj_weight"]:
            found["x_proj_weight"] = _outer(dproj_map.flatten(2), s.tokens).view_as(w.x_proj_weight)
        if need["Ds"]:
            found["Ds"] = (dy_map * s.tokens).sum((0, 1)).repeat(DIRECTIONS)
        dx = du_map.transpose(0, 1).reshape(u.shape).to(u.dtype) if ctx.needs_input_grad[0] else None
        return dx, *(found[name].to(t.dtype) if need[name] else None for name, t in zip(need, weights))


def _read(tensor: Tensor, places: tuple[Tensor | slice, ...]) -> Tensor:
    """tensor[places]. Where that has other strides than a compiler of programs believes, a contiguous copy."""
    found = tensor[places]
    return found.clone(memory_format=torch.contiguous_format) if torch.compiler.is_compiling() else found


def _in_map(y: Tensor, u: Tensor) -> Tensor:
    """[L, B, E] → [B, H, W, E] as u."""
    return y.transpose(0, 1).reshape(u.shape).to(u.dtype)


def _exported_outputs(s: _Sequence, h: Tensor) -> Tensor:
    """The sum of the four scans [L, B, E] without D, their outputs taken back to where they were read."""
    u, _, B, C, delta = s.inputs(s.places)
    outputs = scan_outputs(u, delta, s.At[:, 0].mT, B, C, h)
    if s.w.state_offset is not None:
        outputs = outputs + C @ s.w.state_offset.mT
    return _taken_back(outputs, s)


def _taken_back(outputs: Tensor, s: _Sequence) -> Tensor:
    """The sum over directions [L, B, E] of outputs [L, 4, B, E], each where its token was read."""
    back = s.places.argsort(0)  # [L, 4], the step at which each place is read
    return outputs[back, s.directions].sum(1)


def _definition(u: Tensor, *weights: Tensor | None) -> Tensor:
    return naive.ss2d(u, SS2DWeights(*weights))  # type: ignore[arg-type]  # the first five are never None


def _sequence(u: Tensor, weights: tuple[Tensor | None, ...]) -> _Sequence:
    wide = torch.promote_types(u.dtype, torch.float32)
    return _Sequence(u.to(wide), SS2DWeights._make(weights).each(lambda t: t.to(wide)))


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Σ over tokens of a bᵀ: [L, B, i] and [L, B, j] → [i, j]."""
    return a.flatten(0, 1).T @ b.flatten(0, 1)
