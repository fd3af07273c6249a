"""Depthwise causal convolution + SiLU in Triton, every direction of a block in one launch.

The backward through SiLU is part of `mixer/projections.py`, where the gradient of u is finished.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


@triton.jit
def conv_preactivation(row_ptr, weight_ptr, bias_ptr, step, chan, L, E, sl, se, direction, K: tl.constexpr):
    """bias + Σ_k weight[:, k] x[step ∓ (K-1-k)] as a [steps, channels] float32 tile.

    row_ptr: the sample's first element; step: [T] tokens of it; chan: [C]; direction +1 reads earlier tokens, -1 later.
    """
    mask_e = chan < E
    acc = tl.load(bias_ptr + chan, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([step.shape[0], chan.shape[0]], tl.float32) + acc
    for k in tl.static_range(K):
        source = step - direction * (K - 1 - k)
        mask = ((source >= 0) & (source < L))[:, None] & mask_e[None, :]
        x = tl.load(row_ptr + (source * sl)[:, None] + (chan * se)[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + chan * K + k, mask=mask_e, other=0.0).to(tl.float32)
        acc += x.to(tl.float32) * w[None, :]
    return acc


@triton.jit
def _forward(
    x_ptr, w0, w1, b0, b1, u_ptr, B, L, E, sb, sl, se,
    REV0: tl.constexpr, REV1: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """u = silu(conv(x)) of every direction [G, B, L, E]; the directions' reads of x meet in the cache."""
    chan = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    step = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = tl.program_id(2).to(tl.int64)
    mask = (step < L)[:, None] & (chan < E)[None, :]
    for d in tl.static_range(G):
        direction = 1 - 2 * (REV1 if d == 1 else REV0)
        weight, bias = (w1, b1) if d == 1 else (w0, b0)
        pre = conv_preactivation(x_ptr + b * sb, weight, bias, step, chan, L, E, sl, se, direction, K)
        u = (pre * sigmoid(pre)).to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + (d * B + b) * L * E + step[:, None] * E + chan[None, :], u, mask=mask)


@triton.jit
def _input_gradient(
    g_ptr, w0, w1, dx_ptr, B, L, E, sb, sl, se,
    REV0: tl.constexpr, REV1: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx[s] = Σ_directions Σ_k weight[:, k] g[s ± (K-1-k)], where g is the gradient of the preactivation."""
    chan = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    step = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = tl.program_id(2).to(tl.int64)
    mask_e = chan < E
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for d in tl.static_range(G):
        direction = 1 - 2 * (REV1 if d == 1 else REV0)
        weight = w1 if d == 1 else w0
        for k in tl.static_range(K):
            reader = step + direction * (K - 1 - k)
            mask = ((reader >= 0) & (reader < L))[:, None] & mask_e[None, :]
            at = g_ptr + (d * B + b) * L * E + reader[:, None] * E + chan[None, :]
            g = tl.load(at, mask=mask, other=0.0)
            w = tl.load(weight + chan * K + k, mask=mask_e, other=0.0).to(tl.float32)
            acc += g.to(tl.float32) * w[None, :]
    out = dx_ptr + b * sb + (step * sl)[:, None] + (chan * se)[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=(step < L)[:, None] & mask_e[None, :])


@triton.jit
def _weight_gradient(
    g_ptr, x_ptr, partial_ptr, B, L, E, sb, sl, se,
    REV0: tl.constexpr, REV1: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens of one sample: partial [B, G, K + 1, E]; row k is weight[:, k], row K the bias."""
    chan = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2)
    mask_e = chan < E
    direction = tl.where(d == 0, 1 - 2 * REV0, 1 - 2 * REV1)
    base = (d * B + b) * L
    out = partial_ptr + ((b * tl.num_programs(2) + d) * (K + 1)) * E + chan
    for k in tl.static_range(K + 1):
        acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)  # over tokens once, at the end: a sum crosses warps
        for start in range(0, L, BLOCK_T):
            step = start + tl.arange(0, BLOCK_T)
            mask = (step < L)[:, None] & mask_e[None, :]
            g = tl.load(g_ptr + (base + step)[:, None] * E + chan[None, :], mask=mask, other=0.0).to(tl.float32)
            if k < K:
                source = step - direction * (K - 1 - k)
                inside = mask & ((source >= 0) & (source < L))[:, None]
                offset = b * sb + source.to(tl.int64) * sl
                x = tl.load(x_ptr + offset[:, None] + (chan * se)[None, :], mask=inside, other=0.0)
                g = g * x.to(tl.float32)
            acc += g
        tl.store(out + k * E, tl.sum(acc, axis=0), mask=mask_e)


# Tokens and channels of a tile, and its warps; bench_kernels.py measures them.
_TILE = {"BLOCK_T": 16, "BLOCK_E": 128, "num_warps": 4}


def _grid(batch: int, length: int, channels: int) -> tuple[int, int, int]:
    return triton.cdiv(channels, _TILE["BLOCK_E"]), triton.cdiv(length, _TILE["BLOCK_T"]), batch


def conv_silu(x: Tensor, weights: list[Tensor], biases: list[Tensor], reverse: tuple[bool, ...]) -> Tensor:
    """u [G, B, L, E] in x's dtype from x [B, L, E] (any strides), every direction in one launch."""
    u = torch.empty(len(reverse), *x.shape, dtype=x.dtype, device=x.device)
    _forward[_grid(*x.shape)](
        x, weights[0], weights[-1], biases[0], biases[-1], u, *x.shape, *x.stride(),
        REV0=int(reverse[0]), REV1=int(reverse[-1]), G=len(reverse), K=weights[0].shape[1], **_TILE,
    )  # fmt: skip
    return u


def conv_backward(
    g: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    reverse: tuple[bool, ...],
    dx: Tensor | None,
    need_filters: bool,
) -> tuple[Tensor, ...]:
    """Fills dx [B, L, E] (if given, any strides) from g [G, B, L, E], gradients of the directions' preactivations.

    Returns: if `need_filters`, the filters' gradients [G, E, K] and the biases' [G, E], float32, in a fixed order.
    """
    (groups, batch, length, channels), taps = g.shape, weights[0].shape[1]
    ways = {"REV0": int(reverse[0]), "REV1": int(reverse[-1]), "K": taps}
    if dx is not None:
        _input_gradient[_grid(*dx.shape)](
            g, weights[0], weights[-1], dx, *dx.shape, *dx.stride(), G=groups, **ways, **_TILE
        )
    if not need_filters:
        return ()
    partial = torch.empty(batch, groups, taps + 1, channels, dtype=torch.float32, device=g.device)
    block_e = min(64, triton.next_power_of_2(channels))
    _weight_gradient[(triton.cdiv(channels, block_e), batch, groups)](
        g, x, partial, batch, length, channels, *x.stride(), **ways, BLOCK_T=32, BLOCK_E=block_e, num_warps=4
    )
    total = partial.sum(0)
    return total[:, :taps].transpose(1, 2), total[:, taps]
