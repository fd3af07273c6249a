"""Convolution + LayerNorm + GELU in Triton, for images of few channels in 16 bits: one launch, forward only.

cuDNN's convolutions want many input channels. With three, all taps of a place together are one step of a matrix
product, and a program that owns all channels of its places can apply the norm and GELU to them at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.backends import interpreted
from mambapeft_kernels.gelu.triton_kernels import distribution

_MOST_TAPS, _MOST_CHANNELS = 64, 128  # a program holds all of them
_PLACES, _WARPS = 128, 4  # of a program


@triton.jit(do_not_specialize=["total", "H", "W", "OUT_H", "OUT_W"])
def _forward(
    images_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr, total, H, W, OUT_H, OUT_W, C, eps,
    IN: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M of all `total` places; taps are numbered as the weight has them, [input, row, column]."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tap, chan = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    row, column = place // OUT_W % OUT_H * STRIDE - PADDING, place % OUT_W * STRIDE - PADDING
    image = (place // (OUT_W * OUT_H)).to(tl.int64) * (IN * H * W)
    down, right = tap // SIDE % SIDE, tap % SIDE
    at_row, at_column = row[:, None] + down[None, :], column[:, None] + right[None, :]
    inside = (at_row >= 0) & (at_row < H) & (at_column >= 0) & (at_column < W)
    inside &= (place < total)[:, None] & (tap < IN * SIDE * SIDE)[None, :]
    at = (image + row * W + column)[:, None] + (tap // (SIDE * SIDE) * (H * W) + down * W + right)[None, :]
    x = tl.load(images_ptr + at, mask=inside, other=0.0)
    mask_c = chan < C
    mask_w = (tap < IN * SIDE * SIDE)[:, None] & mask_c[None, :]
    weight = tl.load(weight_ptr + chan[None, :] * (IN * SIDE * SIDE) + tap[:, None], mask=mask_w, other=0.0)
    weight = weight.to(x.dtype)
    maps = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if INTERPRETED:  # it has no 16-bit products; these are exact in float32
        maps += tl.dot(x.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
    else:
        maps += tl.dot(x, weight)
    if HAS_BIAS:
        maps += tl.load(bias_ptr + chan, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    centred = tl.where(mask_c[None, :], maps - (tl.sum(maps, axis=1) / C)[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    norm_weight = tl.load(norm_weight_ptr + chan, mask=mask_c, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + chan, mask=mask_c, other=0.0).to(tl.float32)
    normed = centred * factor[:, None] * norm_weight[None, :] + norm_bias[None, :]
    below, _ = distribution(normed)
    out_at = (place.to(tl.int64) * C)[:, None] + chan[None, :]
    mask = (place < total)[:, None] & mask_c[None, :]
    tl.store(out_ptr + out_at, (normed * below).to(out_ptr.dtype.element_ty), mask=mask)


def takes(images: Tensor, weight: Tensor) -> bool:
    """Whether the kernel does it: taps and channels fit a program."""
    channels, inputs, side, _ = weight.shape
    fits = inputs * side * side <= _MOST_TAPS and channels <= _MOST_CHANNELS
    return images.dtype in (torch.bfloat16, torch.float16) and fits


def _sides(images: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    height, width = ((n + 2 * padding - weight.shape[2]) // stride + 1 for n in images.shape[2:])
    return height, width


@torch.library.custom_op(
    "mambapeft::conv_norm_gelu",
    mutates_args=(),
    schema="(Tensor images, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, int stride, int padding,"
    " float eps) -> Tensor",
)
def conv_norm_gelu(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    padding: int,
    eps: float,
) -> Tensor:
    """See `mambapeft_kernels.conv_norm_gelu`."""
    channels, inputs, side, _ = weight.shape
    height, width = _sides(images, weight, stride, padding)
    out = images.new_empty(len(images), height, width, channels)
    total = len(images) * height * width
    block_m = 16 if interpreted(images.device) else _PLACES
    block_k = max(16, triton.next_power_of_2(inputs * side * side))
    with torch.cuda.device_of(images):
        _forward[(triton.cdiv(total, block_m),)](
            images.contiguous(), weight.contiguous(), weight if bias is None else bias.contiguous(),
            norm_weight.contiguous(), norm_bias.contiguous(), out, total, *images.shape[2:], height, width, channels,
            eps, IN=inputs, SIDE=side, STRIDE=stride, PADDING=padding, HAS_BIAS=bias is not None, BLOCK_M=block_m,
            BLOCK_K=block_k, BLOCK_C=max(16, triton.next_power_of_2(channels)), INTERPRETED=interpreted(images.device),
            num_warps=_WARPS,
        )  # fmt: skip
    return out


@conv_norm_gelu.register_fake
def _(images, weight, bias, norm_weight, norm_bias, stride, padding, eps):
    return images.new_empty(len(images), *_sides(images, weight, stride, padding), weight.shape[0])
