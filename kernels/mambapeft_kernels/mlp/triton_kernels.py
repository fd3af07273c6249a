"""The hidden layer of the MLP in Triton: the first product with GELU behind it; backward with GELU's slope behind it.

The other products, with nothing around them, are cuBLAS's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.backends import interpreted
from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients
from mambapeft_kernels.mlp import naive

# Two blocks fit on a multiprocessor of compute capability 9.0: one computes GELU while the other multiplies.
_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 128}


@triton.jit
def _normal(h):
    """The standard normal distribution at h: Φ and its density.

    Φ(-|h|) by Abramowitz and Stegun, 7.1.26 (absolute error 7.5e-8), which shares its exponential with the density.
    """
    size = tl.abs(h)
    density = tl.exp(-0.5 * h * h)
    t = 1.0 / (1.0 + 0.23164189 * size)  # 0.3275911 / √2
    poly = -0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
    tail = 0.5 * t * (0.254829592 + t * poly) * density
    return tl.where(h > 0, 1.0 - tail, tail), density * 0.3989422804


@triton.jit(do_not_specialize=["M"])
def _hidden(
    x_ptr, up_ptr, bias_ptr, out_ptr, M, N, D: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out [M, N] = GELU(h), h = x upᵀ + bias; or, backward, out becomes out · GELU'(h)."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = (row < M)[:, None], (feature < N)[None, :]
    at = out_ptr + (row * N)[:, None] + feature[None, :]
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask_x, mask_up = mask_m, mask_n
        if D % BLOCK_K:
            mask_x, mask_up = mask_m & (k < D)[None, :], mask_n & (k < D)[:, None]
        x = tl.load(x_ptr + (row * D)[:, None] + k[None, :], mask=mask_x, other=0.0)
        up = tl.load(up_ptr + k[:, None] + (feature * D)[None, :], mask=mask_up, other=0.0)
        if INTERPRETED:  # it has no 16-bit products; these are exact in float32
            h += tl.dot(x.to(tl.float32), up.to(tl.float32), input_precision="ieee")
        else:
            h += tl.dot(x, up)
    h += tl.load(bias_ptr + feature, mask=feature < N, other=0.0).to(tl.float32)[None, :]
    value = h
    factor, density = _normal(h)
    if BACKWARD:
        value = tl.load(at, mask=mask_m & mask_n, other=0.0).to(tl.float32)
        factor += h * density
    tl.store(at, (value * factor).to(out_ptr.dtype.element_ty), mask=mask_m & mask_n)


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """See `mambapeft_kernels.frozen_mlp`; all of one dtype. In float32 cuBLAS is as fast, and exact."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.numel():
        return naive.mlp(x, up, up_bias, down, down_bias)
    return torch.ops.mambapeft.frozen_mlp(x, up, up_bias, down, down_bias)


def _launch(x: Tensor, up: Tensor, up_bias: Tensor, out: Tensor, backward: bool) -> Tensor:
    """`_hidden` for x [M, D] and out [M, N], which it returns; all contiguous."""
    (m, width), hidden = x.shape, len(up)
    grid = triton.cdiv(hidden, _TILE["BLOCK_N"]), triton.cdiv(m, _TILE["BLOCK_M"])  # rows of x meet in the cache
    with torch.cuda.device_of(x):
        _hidden[grid](
            x, up, up_bias, out, m, hidden, width, BACKWARD=backward, BLOCK_K=64 if width % 64 == 0 else 32,
            INTERPRETED=interpreted(x.device), **_TILE,
        )  # fmt: skip
    return out


@torch.library.custom_op("mambapeft::frozen_mlp", mutates_args=())
def _op(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    with no_autocast(x.device.type):
        hidden = _launch(flat, up.contiguous(), up_bias.contiguous(), x.new_empty(len(flat), len(up)), backward=False)
        return torch.addmm(down_bias, hidden, down.T).view(x.shape)


@_op.register_fake
def _(x, up, up_bias, down, down_bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("mambapeft::frozen_mlp_backward", mutates_args=())
def _op_backward(dy: Tensor, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor) -> Tensor:
    """The gradient of x."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    with no_autocast(x.device.type):
        dhidden = dy.reshape(-1, x.shape[-1]) @ down
        return (_launch(flat, up.contiguous(), up_bias.contiguous(), dhidden, backward=True) @ up).view(x.shape)


@_op_backward.register_fake
def _(dy, x, up, up_bias, down):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    tensors = ctx.saved_tensors
    if differentiated_again(dy):
        return tuple(plain_gradients(naive.mlp, tensors, ctx.needs_input_grad, dy))
    return torch.ops.mambapeft.frozen_mlp_backward(dy, *tensors[:4]), None, None, None, None


torch.library.register_autograd("mambapeft::frozen_mlp", _differentiate, setup_context=_setup_context)
