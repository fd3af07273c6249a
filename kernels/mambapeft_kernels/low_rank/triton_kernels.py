"""The low-rank update in Triton: one launch for scale, cast, product and sum; or for these and the linear map itself.

A program owns a tile of the output. An update reads and writes it once; r is so small that this is nearly all the
traffic, and a map that computes both saves it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.backends import interpreted
from mambapeft_kernels.low_rank import naive

# Rows, features and ranks of a tile. Not chosen by r: two compilations serve all ranks, multiples of 16 and others.
_TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_R": 64, "num_warps": 8, "num_stages": 1}
# Inputs of a map from which on cuBLAS's faster product gains more than the update's traffic costs.
_MOST_INPUTS = 512


@triton.jit(do_not_specialize=["m"])
def _add(
    out_ptr, low_ptr, up_ptr, scaled_ptr, scale, m, n, r, out_stride, low_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The first programs along m also store scale · up [n, r], which the backward pass needs."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = row < m, feature < n
    mask = mask_m[:, None] & mask_n[None, :]
    at = out_ptr + (row * out_stride)[:, None] + feature[None, :]
    out = tl.load(at, mask=mask, other=0.0)  # under way while the product is computed
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, r, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        mask_r = rank < r
        low_at = low_ptr + (row * low_stride)[:, None] + rank[None, :]
        low = tl.load(low_at, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        up_at = feature[None, :] * r + rank[:, None]
        mask_up = mask_n[None, :] & mask_r[:, None]
        up = (tl.load(up_ptr + up_at, mask=mask_up, other=0.0).to(tl.float32) * scale).to(low.dtype)
        if tl.program_id(1) == 0:
            tl.store(scaled_ptr + up_at, up, mask=mask_up)
        if INTERPRETED:  # it has no 16-bit products; these are exact in float32
            acc += tl.dot(low.to(tl.float32), up.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(low, up)
    tl.store(at, (out.to(tl.float32) + acc).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def _product(
    x_ptr, weight_ptr, low_ptr, up_ptr, scaled_ptr, out_ptr, scale, m, n, k, r, low_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x [m, k] · weightᵀ + low · round(scale · up)ᵀ; WHOLE: BLOCK_K divides k. Else as `_add`."""
    first = tl.program_id(1).to(tl.int64) * BLOCK_M
    left = (m - first).to(tl.int32)  # rows from here on
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = feature < n
    # Beyond the edges the last row and feature are read again: loads without masks are copied ahead.
    row = tl.minimum(tl.arange(0, BLOCK_M), left - 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, r, BLOCK_R, num_stages=1):
        rank = start + tl.arange(0, BLOCK_R)
        mask_r = rank < r
        low_at = low_ptr + first * low_stride + (row * low_stride)[:, None] + rank[None, :]
        low = tl.load(low_at, mask=mask_r[None, :], other=0.0)
        up_at = feature[None, :] * r + rank[:, None]
        mask_up = mask_n[None, :] & mask_r[:, None]
        up = (tl.load(up_ptr + up_at, mask=mask_up, other=0.0).to(tl.float32) * scale).to(low.dtype)
        if tl.program_id(1) == 0:
            tl.store(scaled_ptr + up_at, up, mask=mask_up)
        if INTERPRETED:
            acc += tl.dot(low.to(tl.float32), up.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(low, up)
    column = tl.arange(0, BLOCK_K)
    x_at = (row * k)[:, None] + column[None, :]
    weight_at = (tl.minimum(feature, n - 1) * k)[None, :] + column[:, None]
    for start in range(0, k, BLOCK_K):
        x_from, weight_from = x_ptr + first * k + start, weight_ptr + start
        if WHOLE:
            x = tl.load(x_from + x_at)
            weight = tl.load(weight_from + weight_at)
        else:
            live = column < k - start
            x = tl.load(x_from + x_at, mask=live[None, :], other=0.0)
            weight = tl.load(weight_from + weight_at, mask=live[:, None], other=0.0)
        if INTERPRETED:
            acc += tl.dot(x.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(x, weight)
    at = out_ptr + first * n + (tl.arange(0, BLOCK_M) * n)[:, None] + feature[None, :]
    mask = (tl.arange(0, BLOCK_M) < left)[:, None] & mask_n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def low_rank_add(out: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    """See `mambapeft_kernels.low_rank_add`. In float32 the time is the product's, which cuBLAS computes faster."""
    if out.dtype not in (torch.bfloat16, torch.float16) or out.stride(1) != 1 or not low.numel() or not up.numel():
        return naive.low_rank_add(out, low, up, scale)
    return torch.ops.mambapeft.low_rank_add(out, low, up, scale)


@torch.library.custom_op(
    "mambapeft::low_rank_add",
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor low, Tensor up, float scale) -> Tensor",
)
def _op(out: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    (m, n), r = out.shape, low.shape[1]
    low = low if low.stride(1) == 1 else low.contiguous()
    scaled = torch.empty(up.shape, dtype=low.dtype, device=up.device)
    grid = triton.cdiv(n, _TILE["BLOCK_N"]), triton.cdiv(m, _TILE["BLOCK_M"])  # rows of low meet in the cache
    with torch.cuda.device_of(out):
        _add[grid](
            out, low, up.contiguous(), scaled, scale, m, n, r, out.stride(0), low.stride(0),
            INTERPRETED=interpreted(out.device), **_TILE,
        )  # fmt: skip
    return scaled


@_op.register_fake
def _(out, low, up, scale):
    return torch.empty(up.shape, dtype=low.dtype, device=up.device)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether one launch for a map and its update is the faster way."""
    return x.dtype in (torch.bfloat16, torch.float16) and weight.shape[1] <= _MOST_INPUTS and x.numel() > 0


def low_rank_product(out: Tensor, x: Tensor, weight: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    """See `mambapeft_kernels.low_rank.low_rank_product`."""
    return torch.ops.mambapeft.low_rank_product(out, x, weight, low, up, scale)


def _product_tile(n: int, k: int) -> dict[str, int]:
    block_k = 64 if k % 64 == 0 else 32
    block_n = 128 if n % 128 == 0 else 64
    return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": 64, "num_warps": 8, "num_stages": 3}


@torch.library.custom_op(
    "mambapeft::low_rank_product",
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor x, Tensor weight, Tensor low, Tensor up, float scale) -> Tensor",
)
def _product_op(out: Tensor, x: Tensor, weight: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    (m, k), (n, r) = x.shape, up.shape
    low = low if low.stride(1) == 1 else low.contiguous()
    scaled = torch.empty(up.shape, dtype=low.dtype, device=up.device)
    tile = _product_tile(n, k)
    grid = triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(m, tile["BLOCK_M"])  # rows of x and low meet in the cache
    with torch.cuda.device_of(x):
        _product[grid](
            x.contiguous(), weight.contiguous(), low, up.contiguous(), scaled, out, scale, m, n, k, r, low.stride(0),
            WHOLE=k % tile["BLOCK_K"] == 0, INTERPRETED=interpreted(x.device), **tile,
        )  # fmt: skip
    return scaled


@_product_op.register_fake
def _(out, x, weight, low, up, scale):
    return torch.empty(up.shape, dtype=low.dtype, device=up.device)
