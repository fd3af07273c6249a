"""Depthwise causal convolution + SiLU in Triton: pieces shared by the mixer's kernels, and the backward passes.

The forward convolution has no launch of its own: `mixer/projections.py` computes it where x_proj reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


@triton.jit
def conv_preactivation(
    x_ptr, weight_ptr, bias_ptr, batch, step, chan, tok_mask, L, E, sb, sl, se, direction, K: tl.constexpr
):
    """bias + Σ_k weight[:, k] x[step ∓ (K-1-k)] as a [tokens, channels] float32 tile.

    batch, step: [T] int64; chan: [C]; direction +1 reads earlier tokens, -1 later ones.
    """
    mask_e = chan < E
    acc = tl.load(bias_ptr + chan, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([step.shape[0], chan.shape[0]], tl.float32) + acc
    row = x_ptr + batch * sb
    for k in tl.static_range(K):
        source = step - direction * (K - 1 - k)
        mask = (tok_mask & (source >= 0) & (source < L))[:, None] & mask_e[None, :]
        x = tl.load(row[:, None] + (source * sl)[:, None] + (chan * se)[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + chan * K + k, mask=mask_e, other=0.0).to(tl.float32)
        acc += x.to(tl.float32) * w[None, :]
    return acc


@triton.jit
def _input_gradient(
    g_ptr, w0_ptr, w1_ptr, dx_ptr, tokens, L, E, sb, sl, se,
    REV0: tl.constexpr, REV1: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx[s] = Σ_directions Σ_k weight[:, k] g[s ± (K-1-k)], where g is the gradient of the preactivation."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    chan = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_t, mask_e = token < tokens, chan < E
    batch, step = token // L, token % L
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for d in tl.static_range(G):
        reverse = REV1 if d == 1 else REV0
        weight = w1_ptr if d == 1 else w0_ptr
        for k in tl.static_range(K):
            shift = -(K - 1 - k) if reverse else (K - 1 - k)
            reader = step + shift
            mask = (mask_t & (reader >= 0) & (reader < L))[:, None] & mask_e[None, :]
            offsets = (d * tokens + token + shift) * E
            g = tl.load(g_ptr + offsets[:, None] + chan[None, :], mask=mask, other=0.0)
            w = tl.load(weight + chan * K + k, mask=mask_e, other=0.0).to(tl.float32)
            acc += g.to(tl.float32) * w[None, :]
    out = dx_ptr + (batch * sb + step * sl)[:, None] + (chan * se)[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_e[None, :])


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
        acc = tl.zeros([BLOCK_E], tl.float32)
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
            acc += tl.sum(g, axis=0)
        tl.store(out + k * E, acc, mask=mask_e)


def conv_input_gradient(g: Tensor, weights: list[Tensor], reverse: tuple[bool, ...], dx: Tensor) -> None:
    """Fills dx [B, L, E] (any strides) from g [G, B, L, E], the gradients of both preactivations."""
    groups, batch, length, channels = g.shape
    tokens = batch * length
    block_t, block_e = 16, min(128, triton.next_power_of_2(channels))
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(channels, block_e))
    _input_gradient[grid](
        g, weights[0], weights[-1], dx, tokens, length, channels, *dx.stride(),
        REV0=int(reverse[0]), REV1=int(reverse[-1]), G=groups, K=weights[0].shape[1],
        BLOCK_T=block_t, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip


def conv_weight_gradients(g: Tensor, x: Tensor, taps: int, reverse: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """Gradients of the filters [G, E, K] and biases [G, E] (float32), summed sample by sample in a fixed order."""
    groups, batch, length, channels = g.shape
    partial = torch.empty(batch, groups, taps + 1, channels, dtype=torch.float32, device=g.device)
    block_e = min(64, triton.next_power_of_2(channels))
    _weight_gradient[(triton.cdiv(channels, block_e), batch, groups)](
        g, x, partial, batch, length, channels, *x.stride(),
        REV0=int(reverse[0]), REV1=int(reverse[-1]), K=taps, BLOCK_T=32, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    total = partial.sum(0)
    return total[:, :taps].transpose(1, 2), total[:, taps]
