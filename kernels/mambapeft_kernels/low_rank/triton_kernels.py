"""The low-rank update in Triton: one launch for scale, cast, product and sum.

A program owns a tile of the output, which it reads and writes once; r is so small that this is nearly all the traffic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.backends import interpreted
from mambapeft_kernels.low_rank import naive

# Rows, features and ranks of a tile. Not chosen by r: two compilations serve all ranks, multiples of 16 and others.
_TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_R": 64, "num_warps": 8, "num_stages": 1}


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
