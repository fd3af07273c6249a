"""GELU in Triton for 16-bit activations: one launch each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.block_order import from_last
from mambapeft_kernels.derivatives import differentiated_again, plain_gradients
from mambapeft_kernels.gelu import naive

_TILE = {"BLOCK": 2048, "num_warps": 4}


@triton.jit
def distribution(x):
    """Φ(x) to 8e-8 and e^(-x²/2): formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions."""
    t = 1.0 / (1.0 + 0.23164190 * tl.abs(x))
    density = tl.exp2(x * x * -0.72134752)
    half = 0.12741480 + t * (-0.14224837 + t * (0.71070687 + t * (-0.72657601 + t * 0.53070271)))
    tail = half * t * density
    return tl.where(x < 0, tail, 1.0 - tail), density


@triton.jit
def _forward(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = from_last().to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    below, _ = distribution(x)
    tl.store(out_ptr + at, (x * below).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(grad_ptr, x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """grad · (Φ(x) + x Φ'(x))."""
    at = from_last().to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    below, density = distribution(x)
    slope = below + x * (0.39894228 * density)
    tl.store(out_ptr + at, (grad * slope).to(out_ptr.dtype.element_ty), mask=mask)


def gelu(x: Tensor) -> Tensor:
    """See `mambapeft_kernels.gelu`. In float32 the formula would be the larger error, and PyTorch's op takes it."""
    return torch.ops.mambapeft.gelu(x) if _takes(x) else naive.gelu(x)


def gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """See `mambapeft_kernels.gelu.api.gelu_gradient`."""
    return torch.ops.mambapeft.gelu_backward(grad, x) if _takes(x) else naive.gelu_gradient(grad, x)


def _takes(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0


@torch.library.custom_op("mambapeft::gelu", mutates_args=(), schema="(Tensor x) -> Tensor")
def _op(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(x.numel(), _TILE["BLOCK"]),)](x.contiguous(), out, x.numel(), **_TILE)
    return out


@_op.register_fake
def _(x):
    return x.new_empty(x.shape)


@torch.library.custom_op("mambapeft::gelu_backward", mutates_args=(), schema="(Tensor grad, Tensor x) -> Tensor")
def _op_backward(grad: Tensor, x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _backward[(triton.cdiv(x.numel(), _TILE["BLOCK"]),)](grad.contiguous(), x.contiguous(), out, x.numel(), **_TILE)
    return out


@_op_backward.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    (x,) = ctx.saved_tensors
    if differentiated_again(grad):
        return plain_gradients(naive.gelu, (x,), (True,), grad)[0]
    return torch.ops.mambapeft.gelu_backward(grad, x)


torch.library.register_autograd("mambapeft::gelu", _differentiate, setup_context=_setup_context)
