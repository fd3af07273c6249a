"""The scans of `ss2d` in Triton: every direction reads the one map in its own order.

A program owns a tile of channels of one sample, direction and segment of the sequence, and walks the segment in chunks
of BLOCK_T steps. Δ of a chunk is a small product that never leaves the chip. Within a chunk the recurrence is an
associative scan over the steps. With one warp and channels across its lanes, a thread holds all steps of its channels,
and the scan is a plain loop over registers. Segments let one long sequence fill the chip: a first pass finds the
state with which each segment is entered.

Heights, widths and numbers of states are compile-time constants, numbers of samples and channels are not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.backends import interpreted
from mambapeft_kernels.ss2d.api import DIRECTIONS, SS2DWeights
from mambapeft_kernels.ss2d.gradients import summed

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(v, EXACT: tl.constexpr):
    """max(v, 0) + log1p(a), a = e^-|v|: to float32's last bits, or in half as many instructions to 6e-5 of it."""
    a = tl.exp2(-tl.abs(v) * _LOG2E)
    if EXACT:
        q = a / (2.0 + a)  # log1p(a) = 2 artanh(q), q <= 1/3
        s = q * q
        series = 1.0 + s * (
            0.33333334 + s * (0.2 + s * (0.14285715 + s * (0.11111111 + s * (0.09090909 + s * 0.07692308))))
        )
        log = 2.0 * q * series
    else:  # the polynomial of the smallest relative error on [0, 1]
        log = a * (0.99994326 + a * (-0.4969778 + a * (0.30630088 + a * (-0.15742712 + a * 0.04134726))))
    return tl.maximum(v, 0.0) + log


@triton.jit
def _one_minus_exp(delta, EXACT: tl.constexpr):
    """1 - e^-Δ, which is softplus' derivative; a series where the subtraction would cancel, as long as asked for."""
    far = 1.0 - tl.exp2(-delta * _LOG2E)
    if EXACT:
        series = delta * (1.0 - delta * (1 / 2) * (1.0 - delta * (1 / 3) * (1.0 - delta * (1 / 4) * (1.0 - delta / 5))))
        return tl.where(delta < 0.1, series, far)
    else:
        return tl.where(delta < 0.03, delta - delta * delta * 0.5, far)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """A product with float32 accumulation. Triton's interpreter has no 16-bit products: exact in float32 there."""
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _then(a0, x0, a1, x1):
    """h → a0 h + x0, and then h → a1 h + x1."""
    return a0 * a1, x0 * a1 + x1


@triton.jit
def _then_keeping(a0, x0, p0, b0, a1, x1, p1, b1):
    """As `_then`; p h + b is the state before the last step."""
    return a0 * a1, x0 * a1 + x1, a0 * p1, x0 * p1 + b1


@triton.jit
def _place(step, k, H: tl.constexpr, W: tl.constexpr):
    """The place row·W + column that direction k reads at `step`."""
    forward = tl.where(k < 2, step, H * W - 1 - step)
    return tl.where(k % 2 == 0, forward, (forward % H) * W + forward // H)


@triton.jit
def _row(tile, n, NB: tl.constexpr):
    """Row n of a [NB, channels] tile."""
    return tl.sum(tl.where(tl.arange(0, NB)[:, None] == n, tile, 0.0), axis=0)


@triton.jit
def _with_row(tile, n, row, NB: tl.constexpr):
    """The tile with row n replaced."""
    return tl.where(tl.arange(0, NB)[:, None] == n, row[None, :], tile)


@triton.jit
def _states(ptr, k, chan, E, N: tl.constexpr, NB: tl.constexpr):
    """Direction k of a float32 [4, N, E] tensor as [NB, channels]; zeros beyond its edges."""
    n = tl.arange(0, NB)
    mask = (n < N)[:, None] & (chan < E)[None, :]
    return tl.load(ptr + ((k * N + n) * E)[:, None] + chan[None, :], mask=mask, other=0.0)


@triton.jit
def _dt_weights(weight_ptr, bias_ptr, k, chan, E, R: tl.constexpr, RP: tl.constexpr, io: tl.constexpr):
    """dt_projᵀ [RP, channels] in the activations' dtype and its bias [channels], of direction k."""
    rank = tl.arange(0, RP)
    mask = (rank < R)[:, None] & (chan < E)[None, :]
    weight = tl.load(weight_ptr + ((k * E + chan) * R)[None, :] + rank[:, None], mask=mask, other=0.0)
    return weight.to(io), tl.load(bias_ptr + k * E + chan, mask=chan < E, other=0.0)


@triton.jit
def _inputs(
    u_ptr, proj_ptr, weight, bias, place, live, chan, k, E,
    R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u and Δ [steps, channels] of a sample's chunk; a step beyond the end has Δ = 0 and leaves the state alone."""
    mask = live[:, None] & (chan < E)[None, :]
    u = tl.load(u_ptr + (place * E)[:, None] + chan[None, :], mask=mask, other=0.0)
    low = _low(proj_ptr, place, live, k, R, RP, P)
    raw = _dot(low, weight, PRECISION) + bias[None, :]
    delta = _softplus(raw, u.dtype == tl.float32)
    return u.to(tl.float32), tl.where(mask, delta, 0.0)


@triton.jit
def _store_channel_sums(at, tile, live, PRECISION: tl.constexpr):
    """Σ over the channels of a [steps, channels] tile → at [steps].

    In 16 bits by a product with ones: sums across lanes would take a fifth of the backward's instructions.
    """
    io: tl.constexpr = at.dtype.element_ty
    if io == tl.float32:
        tl.store(at, tl.sum(tile, axis=1), mask=live)
    else:
        column = tl.arange(0, 16)
        sums = _dot(tile.to(io), tl.full([tile.shape[1], 16], 1.0, tl.float32).to(io), PRECISION)
        tl.store(at[:, None] + column[None, :], sums.to(io), mask=live[:, None] & (column == 0)[None, :])


@triton.jit
def _low(proj_ptr, place, live, k, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr):
    """δ [steps, RP] of direction k."""
    rank = tl.arange(0, RP)
    at = proj_ptr + (place * (4 * P) + k * P)[:, None] + rank[None, :]
    return tl.load(at, mask=live[:, None] & (rank < R)[None, :], other=0.0)


@triton.jit
def _entered(
    first, decay_ptr, end_ptr, A, group, segment, chan, E, BACKWARD: tl.constexpr, SEGMENTS: tl.constexpr,
    N: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The state (or adjoint, coming from the other end) with which a segment is entered, [NB, channels]."""
    h = first
    n = tl.arange(0, NB)
    for i in range(SEGMENTS - 1 - segment if BACKWARD else segment):
        s = group * SEGMENTS + (SEGMENTS - 1 - i if BACKWARD else i)
        total = tl.load(decay_ptr + s * E + chan, mask=chan < E, other=0.0)
        mask = (n < N)[:, None] & (chan < E)[None, :]
        end = tl.load(end_ptr + ((s * N + n) * E)[:, None] + chan[None, :], mask=mask, other=0.0)
        h = tl.exp2(A * total[None, :]) * h + end
    return h


@triton.jit(do_not_specialize=["E", "chunks"])
def _segment_states(
    u_ptr, dy_ptr, proj_ptr, weight_ptr, bias_ptr, a_ptr, decay_ptr, end_ptr, E, chunks,
    H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    UNIT: tl.constexpr, BACKWARD: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ΣΔ [B, 4, S, E] of each segment and its last state from zero [B, 4, S, N, E]; BACKWARD: its first adjoint."""
    E = E * UNIT
    k = tl.program_id(0) % 4
    chan = tl.program_id(0) // 4 * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2) + (1 if BACKWARD else 0)
    P: tl.constexpr = R + 2 * N
    L: tl.constexpr = H * W
    A = _states(a_ptr, k, chan, E, N, NB)
    weight, bias = _dt_weights(weight_ptr, bias_ptr, k, chan, E, R, RP, u_ptr.dtype.element_ty)
    i = tl.arange(0, BLOCK_T)
    first: tl.constexpr = BLOCK_T - 1 if BACKWARD else 0
    h = tl.zeros([NB, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    for c in range(chunks):
        step = (segment * chunks + (chunks - 1 - c if BACKWARD else c)) * BLOCK_T + i
        live = step < L
        place = _place(step, k, H, W)
        u, delta = _inputs(
            u_ptr + b * L * E, proj_ptr + b * L * (4 * P), weight, bias, place, live, chan, k, E, R, RP, P, PRECISION
        )
        total += tl.sum(delta, axis=0)
        entry = proj_ptr + (b * L + place) * (4 * P) + k * P + R
        for n in range(N):
            decay = tl.exp2(delta * _row(A, n, NB)[None, :])
            if BACKWARD:
                mask = live[:, None] & (chan < E)[None, :]
                dy = tl.load(dy_ptr + b * L * E + (place * E)[:, None] + chan[None, :], mask=mask, other=0.0)
                C = tl.load(entry + N + n, mask=live, other=0.0).to(tl.float32)
                x = decay * dy.to(tl.float32) * C[:, None]
            else:
                x = delta * u * tl.load(entry + n, mask=live, other=0.0).to(tl.float32)[:, None]
            x = tl.where((i == first)[:, None], x + decay * _row(h, n, NB)[None, :], x)
            if BACKWARD:
                _, s = tl.associative_scan((tl.flip(decay, 0), tl.flip(x, 0)), 0, _then)
                s = tl.flip(s, 0)
            else:
                _, s = tl.associative_scan((decay, x), 0, _then)
            last = tl.sum(tl.where((i == BLOCK_T - 1 - first)[:, None], s, 0.0), axis=0)
            h = _with_row(h, n, last, NB)
    s = (b * 4 + k) * SEGMENTS + segment
    n = tl.arange(0, NB)
    tl.store(decay_ptr + s * E + chan, total, mask=chan < E)
    at = end_ptr + ((s * N + n) * E)[:, None] + chan[None, :]
    tl.store(at, h, mask=(n < N)[:, None] & (chan < E)[None, :])


@triton.jit(do_not_specialize=["E", "chunks", "batch"])
def _forward(
    u_ptr, proj_ptr, weight_ptr, bias_ptr, a_ptr, first_ptr, offset_ptr, decay_ptr, end_ptr, y_ptr, ckpt_ptr,
    E, chunks, batch, H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, UNIT: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_OFFSET: tl.constexpr, SAVE: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C·(h + offset) of each direction [4, B, L, E], and the state that enters each chunk [B, 4, chunks, N, E]."""
    E = E * UNIT  # a multiple of UNIT, which is all that may be known of it
    k = tl.program_id(0) % 4
    chan = tl.program_id(0) // 4 * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    P: tl.constexpr = R + 2 * N
    L: tl.constexpr = H * W
    A = _states(a_ptr, k, chan, E, N, NB)
    weight, bias = _dt_weights(weight_ptr, bias_ptr, k, chan, E, R, RP, u_ptr.dtype.element_ty)
    h = tl.zeros([NB, BLOCK_E], tl.float32)
    if HAS_FIRST:
        h = _states(first_ptr, k, chan, E, N, NB)
    if SEGMENTS > 1:
        h = _entered(h, decay_ptr, end_ptr, A, b * 4 + k, segment, chan, E, False, SEGMENTS, N, NB)
    offset = tl.zeros([NB, BLOCK_E], tl.float32)
    if HAS_OFFSET:
        offset = _states(offset_ptr, k, chan, E, N, NB)
    i = tl.arange(0, BLOCK_T)
    rows = tl.arange(0, NB)
    for c in range(segment * chunks, (segment + 1) * chunks):
        step = c * BLOCK_T + i
        live = step < L
        place = _place(step, k, H, W)
        u, delta = _inputs(
            u_ptr + b * L * E, proj_ptr + b * L * (4 * P), weight, bias, place, live, chan, k, E, R, RP, P, PRECISION
        )
        if SAVE:
            at = ckpt_ptr + ((b * 4 + k) * SEGMENTS * chunks + c) * N * E + (rows * E)[:, None] + chan[None, :]
            tl.store(at, h.to(ckpt_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (chan < E)[None, :])
        entry = proj_ptr + (b * L + place) * (4 * P) + k * P + R
        y = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for n in range(N):
            decay = tl.exp2(delta * _row(A, n, NB)[None, :])
            x = delta * u * tl.load(entry + n, mask=live, other=0.0).to(tl.float32)[:, None]
            x = tl.where((i == 0)[:, None], x + decay * _row(h, n, NB)[None, :], x)
            _, s = tl.associative_scan((decay, x), 0, _then)
            C = tl.load(entry + N + n, mask=live, other=0.0).to(tl.float32)
            y += (s + _row(offset, n, NB)[None, :]) * C[:, None]
            h = _with_row(h, n, tl.sum(tl.where((i == BLOCK_T - 1)[:, None], s, 0.0), axis=0), NB)
        at = y_ptr + ((k * batch + b) * L * E) + (place * E)[:, None] + chan[None, :]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=live[:, None] & (chan < E)[None, :])


@triton.jit(do_not_specialize=["E", "chunks", "batch"])
def _backward(
    dy_ptr, u_ptr, proj_ptr, weight_ptr, bias_ptr, a_ptr, offset_ptr, decay_ptr, end_ptr, ckpt_ptr,
    du_ptr, dproj_ptr, dweight_ptr, dbias_ptr, da_ptr, dfirst_ptr, doffset_ptr, E, chunks, batch,
    H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    UNIT: tl.constexpr, HAS_OFFSET: tl.constexpr, NEED_U: tl.constexpr, NEED_PROJ: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_A: tl.constexpr, NEED_FIRST: tl.constexpr,
    NEED_OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scans' share of du [4, B, L, E], and partial sums over channels, samples and segments of the rest."""
    E = E * UNIT
    k = tl.program_id(0) % 4
    tile = tl.program_id(0) // 4
    chan = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = chan < E
    b = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    P: tl.constexpr = R + 2 * N
    L: tl.constexpr = H * W
    A = _states(a_ptr, k, chan, E, N, NB)
    weight, bias = _dt_weights(weight_ptr, bias_ptr, k, chan, E, R, RP, u_ptr.dtype.element_ty)
    carry = tl.zeros([NB, BLOCK_E], tl.float32)  # a_{t+1} g_{t+1}
    if SEGMENTS > 1:
        carry = _entered(carry, decay_ptr, end_ptr, A, b * 4 + k, segment, chan, E, True, SEGMENTS, N, NB)
    offset = tl.zeros([NB, BLOCK_E], tl.float32)
    if HAS_OFFSET:
        offset = _states(offset_ptr, k, chan, E, N, NB)
    dA = tl.zeros([NB, BLOCK_E], tl.float32)
    doffset = tl.zeros([NB, BLOCK_E], tl.float32)
    dbias = tl.zeros([BLOCK_E], tl.float32)
    dweight = tl.zeros([RP, BLOCK_E], tl.float32)
    i = tl.arange(0, BLOCK_T)
    rows = tl.arange(0, NB)
    rank = tl.arange(0, RP)
    mask_n = (rows < N)[:, None] & mask_e[None, :]
    ones = tl.full([BLOCK_T, BLOCK_E], 1.0, tl.float32)
    zeros = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for back in range(chunks):
        c = (segment + 1) * chunks - 1 - back
        step = c * BLOCK_T + i
        live = step < L
        mask = live[:, None] & mask_e[None, :]
        place = _place(step, k, H, W)
        u, delta = _inputs(
            u_ptr + b * L * E, proj_ptr + b * L * (4 * P), weight, bias, place, live, chan, k, E, R, RP, P, PRECISION
        )
        dy = tl.load(dy_ptr + b * L * E + (place * E)[:, None] + chan[None, :], mask=mask, other=0.0).to(tl.float32)
        at = ckpt_ptr + ((b * 4 + k) * SEGMENTS * chunks + c) * N * E + (rows * E)[:, None] + chan[None, :]
        start = tl.load(at, mask=mask_n, other=0.0).to(tl.float32)
        entry = proj_ptr + (b * L + place) * (4 * P) + k * P + R
        dentry = dproj_ptr + ((tile * batch + b) * L + place) * (4 * P) + k * P
        gB = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        passed_A = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for n in range(N):
            a = _row(A, n, NB)[None, :]
            B = tl.load(entry + n, mask=live, other=0.0).to(tl.float32)
            C = tl.load(entry + N + n, mask=live, other=0.0).to(tl.float32)
            decay = tl.exp2(delta * a)
            # The states h, and `before`, the states one step earlier.
            first = _row(start, n, NB)[None, :]
            is_first = (i == 0)[:, None]
            x = delta * u * B[:, None]
            x = tl.where(is_first, x + decay * first, x)
            _, h, _, before = tl.associative_scan((decay, x, ones, tl.where(is_first, first, zeros)), 0, _then_keeping)
            if NEED_PROJ:  # before the adjoint: h is not needed any more
                read = dy * (h + _row(offset, n, NB)[None, :])
                _store_channel_sums(dentry + R + N + n, read, live, PRECISION)
            # q = a g, and `after`, what arrives from the next step: g = C dy + after.
            last = _row(carry, n, NB)[None, :]
            is_last = (i == BLOCK_T - 1)[:, None]
            x = decay * dy * C[:, None]
            x = tl.where(is_last, x + decay * last, x)
            # Flipped by hand, at no cost within a thread; `reverse=True` exchanges all elements between threads.
            behind = tl.flip(tl.where(is_last, last, zeros), 0)
            _, q, _, after = tl.associative_scan((tl.flip(decay, 0), tl.flip(x, 0), ones, behind), 0, _then_keeping)
            q, after = tl.flip(q, 0), tl.flip(after, 0)
            g = dy * C[:, None] + after
            passed = q * before  # g_t a_t h_{t-1}
            gB += g * B[:, None]
            passed_A += passed * a
            carry = _with_row(carry, n, tl.sum(tl.where(is_first, q, 0.0), axis=0), NB)
            if NEED_PROJ:
                _store_channel_sums(dentry + R + n, g * (delta * u), live, PRECISION)
            if NEED_A:
                dA = _with_row(dA, n, _row(dA, n, NB) + tl.sum(passed * delta, axis=0), NB)
            if NEED_OFFSET:
                doffset = _with_row(doffset, n, _row(doffset, n, NB) + tl.sum(dy * C[:, None], axis=0), NB)
        if NEED_U:
            at = du_ptr + ((k * batch + b) * L * E) + (place * E)[:, None] + chan[None, :]
            tl.store(at, (delta * gB).to(du_ptr.dtype.element_ty), mask=mask)
        # A is in units of log2: exp2(Δ A) is the decay.
        draw = (u * gB + passed_A * (1.0 / _LOG2E)) * _one_minus_exp(delta, u_ptr.dtype.element_ty == tl.float32)
        if NEED_PROJ:
            io = dproj_ptr.dtype.element_ty
            dlow = _dot(draw.to(io), tl.trans(weight), PRECISION)
            at = dentry[:, None] + rank[None, :]
            tl.store(at, dlow.to(io), mask=live[:, None] & (rank < R)[None, :])
        if NEED_WEIGHT:
            low = _low(proj_ptr + b * L * (4 * P), place, live, k, R, RP, P)
            dweight += _dot(tl.trans(low), draw.to(low.dtype), PRECISION)
        if NEED_BIAS:
            dbias += tl.sum(draw, axis=0)
    part = (b * SEGMENTS + segment) * 4 + k
    cell = ((part * N + rows) * E)[:, None] + chan[None, :]
    if NEED_A:
        tl.store(da_ptr + cell, dA, mask=mask_n)
    if NEED_OFFSET:
        tl.store(doffset_ptr + cell, doffset, mask=mask_n)
    if NEED_BIAS:
        tl.store(dbias_ptr + part * E + chan, dbias, mask=mask_e)
    if NEED_WEIGHT:
        at = dweight_ptr + ((part * E + chan) * R)[None, :] + rank[:, None]
        tl.store(at, dweight, mask=(rank < R)[:, None] & mask_e[None, :])
    if NEED_FIRST:  # only the first segment is read
        tl.store(dfirst_ptr + cell, carry, mask=mask_n)


@triton.jit(do_not_specialize=["tokens", "E"])
def _merge(
    parts_ptr, u_ptr, skip_ptr, proj_ptr, weight_ptr, out_ptr, tokens, E,
    UNIT: tl.constexpr, PLANES: tl.constexpr, HAS_SKIP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = Σ_k parts_k (+ skip u) (with COLUMNS + proj · weight); [tokens, E], sums in float32."""
    E = E * UNIT
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    chan = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (token < tokens)[:, None] & (chan < E)[None, :]
    at = (token * E)[:, None] + chan[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + chan, mask=chan < E, other=0.0)
        total = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32) * skip[None, :]
    plane = tokens.to(tl.int64) * E
    for k in tl.static_range(PLANES):
        total += tl.load(parts_ptr + k * plane + at, mask=mask, other=0.0).to(tl.float32)
    for start in range(0, COLUMNS, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < COLUMNS
        p = tl.load(
            proj_ptr + (token * COLUMNS)[:, None] + column[None, :],
            mask=(token < tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + (column * E)[:, None] + chan[None, :], mask=inside[:, None] & (chan < E)[None, :], other=0.0
        )
        total += _dot(p, w, PRECISION)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(channels: int, x: Tensor) -> dict[str, int]:
    """Channels, steps and warps of a program of a scan, and what its rows' length is known to be a multiple of.

    Rows whose length is known to be a multiple of UNIT alone are read UNIT channels a thread, so that 32 threads side
    by side take BLOCK_E channels and each of them holds every step of its own.
    """
    if interpreted(x.device):  # slow for every element: small tiles that small sizes still cross
        return {"BLOCK_T": 2, "BLOCK_E": 2, "UNIT": 1, "num_warps": 1}
    unit = 2 if x.dtype != torch.float32 and channels % 2 == 0 else 1
    warps = 1 if channels < 512 else 2
    return {"BLOCK_T": 16, "BLOCK_E": 32 * unit * warps, "UNIT": unit, "num_warps": warps}


# One warp a program: with fewer of them than this, sequences are cut into segments, of some chunks at least.
WANTED_PROGRAMS, MIN_CHUNKS = 2048, 4


def split(batch: int, length: int, channels: int, x: Tensor) -> tuple[int, int]:
    """Segments of a sequence, and chunks of a segment."""
    tile = _tile(channels, x)
    chunks = triton.cdiv(length, tile["BLOCK_T"])
    programs = batch * DIRECTIONS * triton.cdiv(channels, tile["BLOCK_E"])
    segments = max(1, min(WANTED_PROGRAMS // max(1, programs), chunks // MIN_CHUNKS))
    per_segment = triton.cdiv(chunks, segments)
    return triton.cdiv(chunks, per_segment), per_segment


def _precision(x: Tensor) -> str:
    """float32 products are exact float32 unless torch's own switch allows tf32."""
    if interpreted(x.device):
        return "interpreter"
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _padded(size: int) -> int:
    """An inner size of a Triton product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def _state_major(t: Tensor | None) -> Tensor | None:
    """[4, E, N] → [4, N, E] float32: a row of channels for each state."""
    return t if t is None else t.float().mT.contiguous()


class Scans:
    """Launches the scans over one u: sizes, tiles and the tensors that every launch reads.

    Args:
        u: [B, H, W, E] contiguous. proj: [B, H·W, 4(R + 2N)] contiguous, u's dtype.
        w: weights of all directions; x_proj_weight is in `proj` already.
    """

    adds_skip = False  # Σ D · u is missing in the planes

    def __init__(self, u: Tensor, proj: Tensor, w: SS2DWeights) -> None:
        A = -torch.exp(w.A_logs.float().view(DIRECTIONS, u.shape[-1], -1)) * _LOG2E.value
        A, weight, bias = A.mT.contiguous(), w.dt_projs_weight.contiguous(), w.dt_projs_bias.float().contiguous()
        self.first, self.offset = _state_major(w.initial_states), _state_major(w.state_offset)
        batch, height, width, channels = u.shape
        self.u, self.A, self.batch, self.length, self.channels = u, A, batch, height * width, channels
        self.states, self.rank = A.shape[1], weight.shape[-1]
        self.segments, self.chunks = split(batch, self.length, channels, u)
        self.tile = _tile(channels, u)
        self.tiles = triton.cdiv(channels, self.tile["BLOCK_E"])
        self.inputs = u, proj, weight, bias, A
        self.sizes = {
            "H": height, "W": width, "N": self.states, "NB": triton.next_power_of_2(self.states), "R": self.rank,
            "RP": _padded(self.rank), "SEGMENTS": self.segments, "PRECISION": _precision(u), **self.tile,
        }  # fmt: skip
        self.units = channels // self.tile["UNIT"]

    def forward(self, save: bool) -> tuple[Tensor, Tensor]:
        """C·(h + offset) of each direction [4, B, L, E]; if `save`, the states entering chunks [B, 4, chunks, N, E]."""
        y = self._plane(DIRECTIONS)
        ckpt = self.u.new_empty(self.checkpoint_shape if save else (0,))
        _forward[self._grid(self.segments)](
            *self.inputs, self._or_any(self.first), self._or_any(self.offset), *self._segment_states(None), y, ckpt,
            self.units, self.chunks, self.batch, HAS_FIRST=self.first is not None, HAS_OFFSET=self.offset is not None,
            SAVE=save, **self.sizes,
        )  # fmt: skip
        return y, ckpt

    def backward(self, dy: Tensor, ckpt: Tensor, need: dict[str, bool]) -> dict[str, Tensor]:
        """The gradients that `need` names; all but u's and proj's in float32, summed over samples.

        dy: [B, H, W, E] contiguous; ckpt: the checkpoints of `forward`.
        need: "u" → the scans' share [4, B, L, E], "proj" [B, L, 4(R + 2N)], "weight" [4, E, R], "bias" [4, E],
            "A" (times Δ's unit: of A = -exp(A_logs)), "first", "offset" [4, N, E].
        """
        parts, E, N = self.batch * self.segments, self.channels, self.states
        shapes = {
            "u": (DIRECTIONS, self.batch, self.length, E),
            "proj": (self.tiles, *self.inputs[1].shape),
            "weight": (parts, DIRECTIONS, E, self.rank),
            "bias": (parts, DIRECTIONS, E),
            "A": (parts, DIRECTIONS, N, E),
            "first": (parts, DIRECTIONS, N, E),
            "offset": (parts, DIRECTIONS, N, E),
        }
        out = {
            name: self.u.new_empty(
                shape if need[name] else (0,), dtype=self.u.dtype if name in ("u", "proj") else torch.float32
            )
            for name, shape in shapes.items()
        }
        _backward[self._grid(self.segments)](
            dy, *self.inputs, self._or_any(self.offset), *self._segment_states(dy), ckpt, *out.values(),
            self.units, self.chunks, self.batch, HAS_OFFSET=self.offset is not None,
            **{f"NEED_{name.upper()}": need[name] for name in shapes}, **self.sizes,
        )  # fmt: skip
        return summed(out, need, self.batch, self.segments)

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """The shape of the states that the forward keeps, in u's dtype: one in every BLOCK_T steps."""
        return self.batch, DIRECTIONS, self.segments * self.chunks, self.states, self.channels

    def _segment_states(self, dy: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each segment's effect on the state before it (with dy: on the adjoint behind it); empty for one segment."""
        groups = self.batch * DIRECTIONS * self.segments if self.segments > 1 else 0
        decay = self.A.new_empty(groups, self.channels)
        end = self.A.new_empty(groups, self.states, self.channels)
        if self.segments > 1:
            u, *rest = self.inputs
            _segment_states[self._grid(self.segments - 1)](
                u, self._or_any(dy), *rest, decay, end, self.units, self.chunks, BACKWARD=dy is not None, **self.sizes
            )
        return decay, end

    def _grid(self, segments: int) -> tuple[int, int, int]:
        # The directions of a tile run side by side: what they read meets in the cache.
        return DIRECTIONS * self.tiles, self.batch, segments

    def _plane(self, count: int) -> Tensor:
        return self.u.new_empty(count, self.batch, self.length, self.channels)

    def _or_any(self, t: Tensor | None) -> Tensor:
        """A pointer; an absent tensor is never read."""
        return self.A if t is None else t


def merge(parts: Tensor, x: Tensor, skip: Tensor | None, proj: Tensor | None, weight: Tensor | None) -> Tensor:
    """Σ_k parts_k (+ skip · x) (+ proj · weight), in x's dtype and shape.

    Args:
        parts: [planes, B, L, E]; x: [B, H, W, E] contiguous; skip: [E] float32 or None.
        proj: [B, L, C] and weight: [C, E], both contiguous and in x's dtype; or None.
    """
    channels = x.shape[-1]
    tokens = x.numel() // channels
    columns = 0 if weight is None else weight.shape[0]
    out = torch.empty_like(x)
    if interpreted(x.device):
        sizes = {"BLOCK_T": 16, "BLOCK_E": 16, "BLOCK_C": 16, "num_warps": 1}
    else:
        block_e = max(16, min(128, triton.next_power_of_2(channels)))
        sizes = {"BLOCK_T": 32, "BLOCK_E": block_e, "BLOCK_C": 32, "num_warps": 4}
    unit = next(n for n in (8, 4, 2, 1) if channels % n == 0)
    _merge[(triton.cdiv(tokens, sizes["BLOCK_T"]), triton.cdiv(channels, sizes["BLOCK_E"]))](
        parts, x, *(x if t is None else t for t in (skip, proj, weight)), out, tokens, channels // unit,
        UNIT=unit, PLANES=parts.shape[0], HAS_SKIP=skip is not None, COLUMNS=columns, PRECISION=_precision(x), **sizes,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "E"])
def _channel_products(
    a_ptr, b_ptr, part_ptr, tokens, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, CHUNKS: tl.constexpr
):
    """Σ over a program's tokens of a b, [programs, E]."""
    chan = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for c in range(CHUNKS):
        token = (tl.program_id(0).to(tl.int64) * CHUNKS + c) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (token < tokens)[:, None] & (chan < E)[None, :]
        at = (token * E)[:, None] + chan[None, :]
        a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += a * tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(part_ptr + tl.program_id(0) * E + chan, tl.sum(total, axis=0), mask=chan < E)


def channel_products(a: Tensor, b: Tensor) -> Tensor:
    """Σ over all places of a · b: [B, H, W, E] contiguous, both → [E] float32."""
    channels = a.shape[-1]
    tokens = a.numel() // channels
    sizes = {"BLOCK_T": 16, "BLOCK_E": min(64, triton.next_power_of_2(channels)), "CHUNKS": 32}
    programs = triton.cdiv(tokens, sizes["BLOCK_T"] * sizes["CHUNKS"])
    parts = torch.empty(programs, channels, dtype=torch.float32, device=a.device)
    _channel_products[(programs, triton.cdiv(channels, sizes["BLOCK_E"]))](a, b, parts, tokens, channels, **sizes)
    return parts.sum(0)
