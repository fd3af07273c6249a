"""Depthwise 3x3 convolution + SiLU in Triton over a channel-last map.

A program owns a tile of places and channels. The nine reads of a place overlap with its neighbours' and meet in the
cache. Places are numbered through all samples, so that small maps leave no tile half empty.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.backends import interpreted
from mambapeft_kernels.depthwise_conv2d import naive
from mambapeft_kernels.derivatives import differentiated_again, plain_gradients


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


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """See `mambapeft_kernels.depthwise_conv_silu`; backend: cuda or triton."""
    return torch.ops.mambapeft.depthwise_conv_silu(x, weight, bias, backend)


def _in_cuda(x: Tensor, backend: str) -> bool:
    """Whether the kernels in CUDA C++ run, which take an even number of channels."""
    if backend != "cuda":
        return False
    from mambapeft_kernels.depthwise_conv2d import cuda_kernels

    return cuda_kernels.takes(x)


def _launch(x: Tensor, chunks: int = 1) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """Grid, sizes of the map and tile."""
    batch, height, width, channels = x.shape
    total = batch * height * width
    block_e = min(8 if interpreted(x.device) else 64, triton.next_power_of_2(channels))
    tile = {"BLOCK_T": 32, "BLOCK_E": block_e, "num_warps": 4}
    grid = triton.cdiv(total, tile["BLOCK_T"] * chunks), triton.cdiv(channels, block_e)
    return grid, (total, height, width, channels), tile


@torch.library.custom_op(
    "mambapeft::depthwise_conv_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
)
def _op(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    x = x.contiguous()
    with torch.cuda.device_of(x):
        if _in_cuda(x, backend):
            from mambapeft_kernels.depthwise_conv2d import cuda_kernels

            return cuda_kernels.forward(x, weight, bias)
        out = x.new_empty(x.shape)
        grid, sizes, tile = _launch(x)
        _forward[grid](
            x, weight.contiguous(), weight if bias is None else bias, out, *sizes, HAS_BIAS=bias is not None, **tile
        )
    return out


@_op.register_fake
def _(x, weight, bias, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "mambapeft::depthwise_conv_silu_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor weight, Tensor? bias, str backend, bool need_x, bool need_weight)"
    " -> (Tensor, Tensor)",
)
def _op_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of filters and bias as [10, E] float32; empty where not asked for."""
    dout, x, weight = dout.contiguous(), x.contiguous(), weight.contiguous()
    dx = x.new_empty(x.shape if need_x else (0,))
    with torch.cuda.device_of(x):
        if _in_cuda(x, backend):
            from mambapeft_kernels.depthwise_conv2d import cuda_kernels

            g = cuda_kernels.through_silu(dout, x, weight, bias)
            dx = cuda_kernels.input_gradient(g, weight) if need_x else dx
        else:
            g = torch.empty_like(x)
            grid, sizes, tile = _launch(x)
            given = weight if bias is None else bias
            _through_silu[grid](dout, x, weight, given, g, *sizes, HAS_BIAS=bias is not None, **tile)
            if need_x:
                _input_gradient[grid](g, weight, dx, *sizes, **tile)
        if not need_weight:
            return dx, x.new_empty(0, dtype=torch.float32)
        chunks = 16
        grid, sizes, tile = _launch(x, chunks)
        parts = x.new_empty((grid[0], 10, x.shape[-1]), dtype=torch.float32)
        taps = (*grid, 10)  # nine, and the bias
        _weight_gradient[taps](g, x, parts, *sizes, CHUNKS=chunks, **tile)
    return dx, parts.sum(0)


@_op_backward.register_fake
def _(dout, x, weight, bias, backend, need_x, need_weight):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty((10, x.shape[-1]) if need_weight else (0,), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout):
    x, weight, bias = ctx.saved_tensors
    if differentiated_again(dout):
        return *plain_gradients(naive.depthwise_conv_silu, (x, weight, bias), ctx.needs_input_grad[:3], dout), None
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    dx, sums = torch.ops.mambapeft.depthwise_conv_silu_backward(
        dout, x, weight, bias, ctx.backend, need_x, need_weight or need_bias
    )
    return (
        dx if need_x else None,
        sums[:9].T.reshape(weight.shape).to(weight.dtype) if need_weight else None,
        sums[9].to(bias.dtype) if need_bias else None,
        None,
    )


torch.library.register_autograd("mambapeft::depthwise_conv_silu", _differentiate, setup_context=_setup_context)
