"""The selective scan in Triton: portable, and checkable on a CPU in Triton's interpreter.

A program owns a block of channels of one sample and direction and walks the tokens in order with the state
[channels, N] in registers. The backward walks the chunks from the last to the first; in each it recomputes the
states from the checkpoint into a small scratch that stays in cache, then runs the adjoint recurrence.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.causal_conv1d.triton_kernels import sigmoid
from mambapeft_kernels.selective_scan.checkpoints import CHUNK, empty_checkpoints, num_chunks, padded_states

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _one_minus_exp(delta):
    """1 - e^-Δ, which is sigmoid of Δ before softplus; a series where the subtraction would cancel."""
    series = delta * (1.0 - delta / 2 * (1.0 - delta / 3 * (1.0 - delta / 4 * (1.0 - delta / 5))))
    return tl.where(delta < 0.1, series, 1.0 - tl.exp2(-delta * _LOG2E))


@triton.jit
def _forward(
    u_ptr, delta_ptr, bc_ptr, a0, a1, d0, d1, so0, so1, oo0, oo1, y_ptr, ckpt_ptr,
    B, L, E, chunks, N: tl.constexpr, NP: tl.constexpr, NB: tl.constexpr, T: tl.constexpr,
    REV0: tl.constexpr, REV1: tl.constexpr, BLOCK_E: tl.constexpr,
    SAVE: tl.constexpr, SO0: tl.constexpr, SO1: tl.constexpr, OO0: tl.constexpr, OO1: tl.constexpr,
):  # fmt: skip
    """y = C·(h + h') + D u + y' of one direction, [G, B, L, E], and the checkpoints."""
    chan = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2)
    if d == 0:
        a_ptr, d_ptr = a0, d0
    else:
        a_ptr, d_ptr = a1, d1
    reverse = tl.where(d == 0, REV0, REV1) > 0
    mask_e = chan < E
    n = tl.arange(0, NB)
    mask_n = n < N
    mask = mask_e[:, None] & mask_n[None, :]
    cell = chan[:, None] * N + n[None, :]
    A = tl.load(a_ptr + cell, mask=mask, other=0.0).to(tl.float32)
    A = -tl.exp2(A * _LOG2E) * _LOG2E
    skip = tl.load(d_ptr + chan, mask=mask_e, other=0.0).to(tl.float32)
    read = tl.zeros([BLOCK_E, NB], tl.float32)
    shift = tl.zeros([BLOCK_E], tl.float32)
    if SO0:
        read += tl.load(so0 + cell, mask=mask & (d == 0), other=0.0).to(tl.float32)
    if SO1:
        read += tl.load(so1 + cell, mask=mask & (d == 1), other=0.0).to(tl.float32)
    if OO0:
        shift += tl.load(oo0 + chan, mask=mask_e & (d == 0), other=0.0).to(tl.float32)
    if OO1:
        shift += tl.load(oo1 + chan, mask=mask_e & (d == 1), other=0.0).to(tl.float32)
    row = (d * B + b) * L
    h = tl.zeros([BLOCK_E, NB], tl.float32)
    for c in range(chunks):
        j = tl.where(reverse, chunks - 1 - c, c)
        if SAVE:
            entry = ckpt_ptr + ((d * B + b) * chunks + j) * E * NP
            kept = h.to(ckpt_ptr.dtype.element_ty)
            tl.store(entry + chan[:, None] * NP + n[None, :], kept, mask=mask_e[:, None] & (n < NP)[None, :])
        for i in range(T):
            step = j * T + tl.where(reverse, T - 1 - i, i)
            live = step < L  # beyond the end Δ = 0: the state passes unchanged
            at = (row + step) * E + chan
            u = tl.load(u_ptr + at, mask=mask_e & live, other=0.0).to(tl.float32)
            delta = tl.load(delta_ptr + at, mask=mask_e & live, other=0.0).to(tl.float32)
            bc = bc_ptr + (row + step) * (2 * N) + n
            Bt = tl.load(bc, mask=mask_n & live, other=0.0)
            Ct = tl.load(bc + N, mask=mask_n & live, other=0.0)
            h = tl.exp2(delta[:, None] * A) * h + (delta * u)[:, None] * Bt[None, :]
            y = tl.sum((h + read) * Ct[None, :], axis=1) + skip * u + shift
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask_e & live)


@triton.jit
def _gate_forward(
    y_ptr, z_ptr, out_ptr, total_ptr, tokens, L, E, sb, sl, se, scale,
    G: tl.constexpr, SAVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = Σ_d y_d; out = scale · silu(z) · total."""
    token = tl.program_id(0).to(tl.int64)
    chan = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = chan < E
    total = tl.zeros([BLOCK], tl.float32)
    for d in tl.static_range(G):
        total += tl.load(y_ptr + (d * tokens + token) * E + chan, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + (token // L) * sb + (token % L) * sl + chan * se, mask=mask, other=0.0).to(tl.float32)
    out = scale * z * sigmoid(z) * total
    tl.store(out_ptr + token * E + chan, out.to(out_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        tl.store(total_ptr + token * E + chan, total.to(total_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward(
    dout_ptr, z_ptr, total_ptr, dy_ptr, dz_ptr, L, E, ob, ol, oe, sb, sl, se, zb, zl, ze, scale,
    NEED_DZ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy = scale · silu(z) · dout (float32), shared by both directions; dz = scale · silu'(z) · total · dout."""
    token = tl.program_id(0).to(tl.int64)
    b, step = token // L, token % L
    chan = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = chan < E
    dout = tl.load(dout_ptr + b * ob + step * ol + chan * oe, mask=mask, other=0.0).to(tl.float32) * scale
    z = tl.load(z_ptr + b * sb + step * sl + chan * se, mask=mask, other=0.0).to(tl.float32)
    gate = sigmoid(z)
    tl.store(dy_ptr + token * E + chan, dout * z * gate, mask=mask)
    if NEED_DZ:
        total = tl.load(total_ptr + token * E + chan, mask=mask, other=0.0).to(tl.float32)
        dz = dout * total * gate * (1.0 + z * (1.0 - gate))
        tl.store(dz_ptr + b * zb + step * zl + chan * ze, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    u_ptr, delta_ptr, bc_ptr, dy_ptr, ckpt_ptr, a0, a1, d0, d1, so0, so1,
    scratch_ptr, du_ptr, draw_ptr, dbc_ptr, da_ptr,
    B, L, E, chunks, N: tl.constexpr, NP: tl.constexpr, NB: tl.constexpr, T: tl.constexpr,
    REV0: tl.constexpr, REV1: tl.constexpr, BLOCK_E: tl.constexpr,
    SO0: tl.constexpr, SO1: tl.constexpr, NEED_DA: tl.constexpr,
):  # fmt: skip
    """du, dΔ_raw [G, B, L, E]; dB|dC partial sums [channel blocks, G, B, L, 2N]; dA partials [B, G, E, N]."""
    block = tl.program_id(0)
    chan = block * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2)
    groups = tl.num_programs(2)
    if d == 0:
        a_ptr, d_ptr = a0, d0
    else:
        a_ptr, d_ptr = a1, d1
    reverse = tl.where(d == 0, REV0, REV1) > 0
    mask_e = chan < E
    n = tl.arange(0, NB)
    mask_n = n < N
    mask = mask_e[:, None] & mask_n[None, :]
    cell = chan[:, None] * N + n[None, :]
    A = -tl.exp2(tl.load(a_ptr + cell, mask=mask, other=0.0).to(tl.float32) * _LOG2E)
    A = tl.where(mask, A, 0.0)
    skip = tl.load(d_ptr + chan, mask=mask_e, other=0.0).to(tl.float32)
    read = tl.zeros([BLOCK_E, NB], tl.float32)
    if SO0:
        read += tl.load(so0 + cell, mask=mask & (d == 0), other=0.0).to(tl.float32)
    if SO1:
        read += tl.load(so1 + cell, mask=mask & (d == 1), other=0.0).to(tl.float32)
    row = (d * B + b) * L
    local = tl.arange(0, BLOCK_E)[:, None] * NB + n[None, :]
    program = ((d * B + b) * tl.num_programs(0) + block) * (T * BLOCK_E * NB)
    scratch = scratch_ptr + program + local
    dbc_row = ((block.to(tl.int64) * groups + d) * B + b) * L
    carry = tl.zeros([BLOCK_E, NB], tl.float32)
    dA = tl.zeros([BLOCK_E, NB], tl.float32)
    for c in range(chunks):
        j = tl.where(reverse, c, chunks - 1 - c)
        entry = ckpt_ptr + ((d * B + b) * chunks + j) * E * NP
        h = tl.load(entry + chan[:, None] * NP + n[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()  # the scratch of the chunk before has been read
        for i in range(T):
            tl.store(scratch + i * (BLOCK_E * NB), h)
            step = j * T + tl.where(reverse, T - 1 - i, i)
            live = step < L
            at = (row + step) * E + chan
            u = tl.load(u_ptr + at, mask=mask_e & live, other=0.0).to(tl.float32)
            delta = tl.load(delta_ptr + at, mask=mask_e & live, other=0.0).to(tl.float32)
            Bt = tl.load(bc_ptr + (row + step) * (2 * N) + n, mask=mask_n & live, other=0.0)
            h = tl.exp2(delta[:, None] * (A * _LOG2E)) * h + (delta * u)[:, None] * Bt[None, :]
        tl.debug_barrier()
        for k in range(T):
            i = T - 1 - k
            step = j * T + tl.where(reverse, T - 1 - i, i)
            live = step < L
            at = (row + step) * E + chan
            u = tl.load(u_ptr + at, mask=mask_e & live, other=0.0).to(tl.float32)
            delta = tl.load(delta_ptr + at, mask=mask_e & live, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + (b * L + step) * E + chan, mask=mask_e & live, other=0.0)
            bc = bc_ptr + (row + step) * (2 * N) + n
            Bt = tl.load(bc, mask=mask_n & live, other=0.0)
            Ct = tl.load(bc + N, mask=mask_n & live, other=0.0)
            decay = tl.exp2(delta[:, None] * (A * _LOG2E))
            kept = decay * tl.load(scratch + i * (BLOCK_E * NB))
            h = kept + (delta * u)[:, None] * Bt[None, :]
            g = Ct[None, :] * dy[:, None] + carry
            carry = decay * g
            g_kept = g * kept
            gB = tl.sum(g * Bt[None, :], axis=1)
            ddelta = u * gB + tl.sum(g_kept * A, axis=1)
            dA += g_kept * delta[:, None]
            out = mask_e & live
            tl.store(du_ptr + at, (delta * gB + skip * dy).to(du_ptr.dtype.element_ty), mask=out)
            draw = ddelta * _one_minus_exp(delta)
            tl.store(draw_ptr + at, draw.to(draw_ptr.dtype.element_ty), mask=out)
            dbc = dbc_ptr + (dbc_row + step) * (2 * N) + n
            dB = tl.sum(g * (delta * u)[:, None], axis=0)
            dC = tl.sum((h + read) * dy[:, None], axis=0)
            tl.store(dbc, dB, mask=mask_n & live)
            tl.store(dbc + N, dC, mask=mask_n & live)
    if NEED_DA:
        tl.store(da_ptr + (b * groups + d) * E * N + cell, dA, mask=mask)


def _pair(tensors: Sequence[Tensor | None], filler: Tensor) -> tuple[Tensor, Tensor]:
    """The pointers of both directions; an absent tensor is never read, `filler` only fills its place."""
    first, last = tensors[0], tensors[-1]
    return (filler if first is None else first), (filler if last is None else last)


def _blocks(channels: int, states: int) -> dict[str, int]:
    return {
        "NB": max(2, triton.next_power_of_2(states)),
        "BLOCK_E": min(32, max(2, triton.next_power_of_2(channels))),
        "num_warps": 2,
    }


def scan_forward(
    u: Tensor,
    delta: Tensor,
    bc: Tensor,
    z: Tensor,
    A_log: list[Tensor],
    D: list[Tensor],
    state_offset: list[Tensor | None],
    output_offset: list[Tensor | None],
    reverse: tuple[bool, ...],
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both scans, their sum and the gate.

    Args:
        u, delta: [G, B, L, E] contiguous; bc: [G, B, L, 2N] float32 contiguous; z: [B, L, E] any strides.
        A_log [E, N], D [E], state_offset [E, N] or None, output_offset [E] or None: one for each direction.
        save: also keep what the backward needs.
    Returns: out [B, L, E], total [B, L, E] and checkpoints (both empty unless `save`).
    """
    groups, batch, length, channels = u.shape
    states = A_log[0].shape[1]
    out = torch.empty(u.shape[1:], dtype=u.dtype, device=u.device)
    total = torch.empty_like(out) if save else out.new_empty(0)
    ckpt = empty_checkpoints(u, states) if save else out.new_empty(0)
    y = torch.empty_like(u)
    sizes = _blocks(channels, states)
    _forward[(triton.cdiv(channels, sizes["BLOCK_E"]), batch, groups)](
        u, delta, bc, *_pair(A_log, bc), *_pair(D, bc), *_pair(state_offset, bc), *_pair(output_offset, bc),
        y, ckpt, batch, length, channels, num_chunks(length), N=states, NP=padded_states(states), T=CHUNK,
        REV0=int(reverse[0]), REV1=int(reverse[-1]), SAVE=save,
        SO0=state_offset[0] is not None, SO1=groups == 2 and state_offset[-1] is not None,
        OO0=output_offset[0] is not None, OO1=groups == 2 and output_offset[-1] is not None, **sizes,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(channels))
    _gate_forward[(batch * length, triton.cdiv(channels, block))](
        y, z, out, total, batch * length, length, channels, *z.stride(), scale,
        G=groups, SAVE=save, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out, total, ckpt


def scan_backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    bc: Tensor,
    z: Tensor,
    total: Tensor,
    ckpt: Tensor,
    A_log: list[Tensor],
    D: list[Tensor],
    state_offset: list[Tensor | None],
    reverse: tuple[bool, ...],
    scale: float,
    dz: Tensor | None,
    need_dA: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `scan_forward`.

    Args: as there; dout: [B, L, E] any strides; dz: [B, L, E] any strides, filled if given.
    Returns: du [G, B, L, E] and dΔ_raw [G, B, L, E] (Δ before softplus) in u's dtype,
        d(B|C) as partial sums [P, G, B, L, 2N] float32, dA partial sums [B, G, E, N] float32 or None.
    """
    groups, batch, length, channels = u.shape
    states = A_log[0].shape[1]
    dy = torch.empty(u.shape[1:], dtype=torch.float32, device=u.device)
    block = min(1024, triton.next_power_of_2(channels))
    _gate_backward[(batch * length, triton.cdiv(channels, block))](
        dout, z, total, dy, z if dz is None else dz, length, channels,
        *dout.stride(), *z.stride(), *(z if dz is None else dz).stride(), scale,
        NEED_DZ=dz is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    sizes = _blocks(channels, states)
    blocks = triton.cdiv(channels, sizes["BLOCK_E"])
    du, draw = torch.empty_like(u), torch.empty_like(u)
    dbc = torch.empty(blocks, *bc.shape, dtype=torch.float32, device=u.device)
    dA = torch.empty(batch, groups, channels, states, dtype=torch.float32, device=u.device) if need_dA else None
    scratch = torch.empty(
        groups * batch * blocks * CHUNK * sizes["BLOCK_E"] * sizes["NB"], dtype=torch.float32, device=u.device
    )
    _backward[(blocks, batch, groups)](
        u, delta, bc, dy, ckpt, *_pair(A_log, bc), *_pair(D, bc), *_pair(state_offset, bc),
        scratch, du, draw, dbc, bc if dA is None else dA,
        batch, length, channels, num_chunks(length), N=states, NP=padded_states(states), T=CHUNK,
        REV0=int(reverse[0]), REV1=int(reverse[-1]),
        SO0=state_offset[0] is not None, SO1=groups == 2 and state_offset[-1] is not None,
        NEED_DA=need_dA, **sizes,
    )  # fmt: skip
    return du, draw, dbc, dA


@triton.jit
def _channel_sums(
    draw_ptr, u_ptr, dout_ptr, z_ptr, partial_ptr, dy_ptr, B, L, E, ob, ol, oe, sb, sl, se, scale,
    NEED_STEP: tl.constexpr, NEED_OUTPUT: tl.constexpr, NEED_DY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Per sample and direction: Σ_t of dΔ_raw, dy·u and dy → partial [B, G, 3, E]; dy is written once."""
    chan = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2)
    mask_e = chan < E
    base = (d * B + b) * L
    # Over tokens once, at the end: a sum crosses warps.
    bias = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    skip = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    shift = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, L, BLOCK_T):
        step = start + tl.arange(0, BLOCK_T)
        mask = (step < L)[:, None] & mask_e[None, :]
        at = (base + step)[:, None] * E + chan[None, :]
        if NEED_STEP:
            bias += tl.load(draw_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if NEED_OUTPUT:
            far = step.to(tl.int64)[:, None]
            u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(z_ptr + b * sb + far * sl + (chan * se)[None, :], mask=mask, other=0.0).to(tl.float32)
            dout = tl.load(dout_ptr + b * ob + far * ol + (chan * oe)[None, :], mask=mask, other=0.0)
            dy = scale * dout.to(tl.float32) * z * sigmoid(z)
            skip += dy * u
            shift += dy
            if NEED_DY:
                tl.store(dy_ptr + (b * L + step)[:, None] * E + chan[None, :], dy, mask=mask & (d == 0))
    out = partial_ptr + (b * tl.num_programs(2) + d) * 3 * E + chan
    tl.store(out, tl.sum(bias, axis=0), mask=mask_e)
    tl.store(out + E, tl.sum(skip, axis=0), mask=mask_e)
    tl.store(out + 2 * E, tl.sum(shift, axis=0), mask=mask_e)


def channel_sums(
    draw: Tensor, u: Tensor, dout: Tensor, z: Tensor, scale: float, need_step: bool, need_output: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients that are sums over tokens: dt_bias, D, output_offset, each [G, E]; and dy [B, L, E]; float32.

    need_step: whether the first is asked for, else it is zero; need_output: the next two; need_dy: dy, else empty.
    """
    groups, batch, length, channels = u.shape
    partial = torch.empty(batch, groups, 3, channels, dtype=torch.float32, device=u.device)
    dy = torch.empty(u.shape[1:] if need_dy else (0,), dtype=torch.float32, device=u.device)
    block_e = min(64, triton.next_power_of_2(channels))
    _channel_sums[(triton.cdiv(channels, block_e), batch, groups)](
        draw, u, dout, z, partial, dy, batch, length, channels, *dout.stride(), *z.stride(), scale,
        NEED_STEP=need_step, NEED_OUTPUT=need_output or need_dy, NEED_DY=need_dy, BLOCK_T=32, BLOCK_E=block_e,
        num_warps=4,
    )  # fmt: skip
    sums = partial.sum(0)
    return sums[:, 0], sums[:, 1], sums[:, 2], dy
