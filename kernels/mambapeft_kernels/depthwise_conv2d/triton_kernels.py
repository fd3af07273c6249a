"""Depthwise 3x3 convolution + SiLU in Triton over a channel-last map.

A program owns a tile of places and channels. The nine reads of a place overlap with its neighbours' and meet in the
cache. Places are numbered through all samples, so that small maps leave no tile half empty.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.backends import interpreted

_CHUNKS = 16  # tiles of places whose gradients of filters a program adds up


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-v * 1.4426950408889634))


@triton.jit
def _neighbour(place, total, H, W, i, j):
    """The place (i, j) away, and whether the map has it."""
    row, column = place // W % H + i, place % W + j
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W) & (place < total)
    return place + i * W + j, inside


@triton.jit
def _filter(
    x_ptr, weight_ptr, place, total, chan, H, W, E, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Σ over the 3x3 neighbours of filter · x, [places, channels]; TRANSPOSED turns the filter round."""
    mask_e = chan < E
    out = tl.zeros([place.shape[0], chan.shape[0]], tl.float32)
    for tap in tl.static_range(9):
        at, inside = _neighbour(place, total, H, W, tap // 3 - 1, tap % 3 - 1)
        x = tl.load(
            x_ptr + (at.to(tl.int64) * E)[:, None] + chan[None, :], mask=inside[:, None] & mask_e[None, :], other=0.0
        )
        w = tl.load(weight_ptr + chan * 9 + (8 - tap if TRANSPOSED else tap), mask=mask_e, other=0.0)
        out += x.to(tl.float32) * w.to(tl.float32)[None, :]
    return out


@triton.jit
def _tile_of(BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    place = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    return place, tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)


@triton.jit
def _preactivation(x_ptr, weight_ptr, bias_ptr, place, total, chan, H, W, E, HAS_BIAS: tl.constexpr):
    out = _filter(x_ptr, weight_ptr, place, total, chan, H, W, E, False)
    if HAS_BIAS:
        out += tl.load(bias_ptr + chan, mask=chan < E, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit(do_not_specialize=["total", "H", "W"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, out_ptr, total, H, W, E,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    place, chan = _tile_of(BLOCK_T, BLOCK_E)
    pre = _preactivation(x_ptr, weight_ptr, bias_ptr, place, total, chan, H, W, E, HAS_BIAS)
    mask = (place < total)[:, None] & (chan < E)[None, :]
    at = out_ptr + (place.to(tl.int64) * E)[:, None] + chan[None, :]
    tl.store(at, (pre * _sigmoid(pre)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total", "H", "W"])
def _through_silu(
    dout_ptr, x_ptr, weight_ptr, bias_ptr, g_ptr, total, H, W, E,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient g of the convolution's result, which is computed again."""
    place, chan = _tile_of(BLOCK_T, BLOCK_E)
    pre = _preactivation(x_ptr, weight_ptr, bias_ptr, place, total, chan, H, W, E, HAS_BIAS)
    mask = (place < total)[:, None] & (chan < E)[None, :]
    at = (place.to(tl.int64) * E)[:, None] + chan[None, :]
    gate = _sigmoid(pre)
    g = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32) * gate * (1.0 + pre * (1.0 - gate))
    tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total", "H", "W"])
def _input_gradient(g_ptr, weight_ptr, dx_ptr, total, H, W, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    place, chan = _tile_of(BLOCK_T, BLOCK_E)
    dx = _filter(g_ptr, weight_ptr, place, total, chan, H, W, E, True)
    mask = (place < total)[:, None] & (chan < E)[None, :]
    tl.store(dx_ptr + (place.to(tl.int64) * E)[:, None] + chan[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total", "H", "W"])
def _weight_gradient(
    g_ptr, x_ptr, part_ptr, total, H, W, E, CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Partial sums [programs, 10, E] over places: of g times each of the nine neighbours, and of g (the bias)."""
    chan = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    tap = tl.program_id(2)
    mask_e = chan < E
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for c in range(CHUNKS):
        place = (tl.program_id(0) * CHUNKS + c) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (place < total)[:, None] & mask_e[None, :]
        g = tl.load(g_ptr + (place.to(tl.int64) * E)[:, None] + chan[None, :], mask=mask, other=0.0).to(tl.float32)
        if tap < 9:
            at, inside = _neighbour(place, total, H, W, tap // 3 - 1, tap % 3 - 1)
            mask = inside[:, None] & mask_e[None, :]
            x = tl.load(x_ptr + (at.to(tl.int64) * E)[:, None] + chan[None, :], mask=mask, other=0.0)
            g *= x.to(tl.float32)
        sums += g
    tl.store(part_ptr + (tl.program_id(0) * 10 + tap) * E + chan, tl.sum(sums, axis=0), mask=mask_e)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(conv(x)), [B, H, W, E] contiguous."""
    return _convolved(_forward, (x,), weight, bias)


def through_silu(du: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of conv(x) from the gradient of its SiLU; conv(x) is recomputed."""
    return _convolved(_through_silu, (du, x), weight, bias)


def input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from the gradient of conv(x)."""
    dx = torch.empty_like(g)
    grid, sizes, tile = _launch(g)
    _input_gradient[grid](g, weight, dx, *sizes, **tile)
    return dx


def filter_gradients(g: Tensor, x: Tensor) -> Tensor:
    """The gradients of the nine taps and of the bias from that of conv(x), float32 [10, E]."""
    grid, sizes, tile = _launch(x, _CHUNKS)
    parts = x.new_empty((grid[0], 10, x.shape[-1]), dtype=torch.float32)
    taps = (*grid, 10)  # nine, and the bias
    _weight_gradient[taps](g, x, parts, *sizes, CHUNKS=_CHUNKS, **tile)
    return parts.sum(0)


def _convolved(kernel: Any, maps: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty_like(maps[-1])
    grid, sizes, tile = _launch(out)
    kernel[grid](*maps, weight, weight if bias is None else bias, out, *sizes, HAS_BIAS=bias is not None, **tile)
    return out


def _launch(x: Tensor, chunks: int = 1) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """Grid, sizes of the map and tile."""
    batch, height, width, channels = x.shape
    total = batch * height * width
    block_e = min(8 if interpreted(x.device) else 64, triton.next_power_of_2(channels))
    tile = {"BLOCK_T": 32, "BLOCK_E": block_e, "num_warps": 4}
    grid = triton.cdiv(total, tile["BLOCK_T"] * chunks), triton.cdiv(channels, block_e)
    return grid, (total, height, width, channels), tile
