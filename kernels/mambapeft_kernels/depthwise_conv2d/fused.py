"""The depthwise convolution as one differentiable op over fused kernels: CUDA C++ where that takes a map, or Triton."""

from types import ModuleType

import torch
from torch import Tensor

from mambapeft_kernels.depthwise_conv2d import naive, triton_kernels
from mambapeft_kernels.derivatives import differentiated_again, plain_gradients


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """See `mambapeft_kernels.depthwise_conv_silu`; backend: cuda or triton."""
    return torch.ops.mambapeft.depthwise_conv_silu(x, weight, bias, backend)


def _kernels(x: Tensor, backend: str) -> ModuleType:
    if backend == "cuda":
        from mambapeft_kernels.depthwise_conv2d import cuda_kernels

        if cuda_kernels.takes(x):
            return cuda_kernels
    return triton_kernels


@torch.library.custom_op(
    "mambapeft::depthwise_conv_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
)
def _op(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    x = x.contiguous()
    with torch.cuda.device_of(x):
        return _kernels(x, backend).forward(x, weight.contiguous(), bias)


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
    kernels = _kernels(x, backend)
    with torch.cuda.device_of(x):
        if kernels is not triton_kernels and not need_weight:
            dx = kernels.backward(dout, x, weight, bias) if need_x else x.new_empty(0)
            return dx, x.new_empty(0, dtype=torch.float32)
        g = kernels.through_silu(dout, x, weight, bias)
        dx = kernels.input_gradient(g, weight) if need_x else x.new_empty(0)
        sums = triton_kernels.filter_gradients(g, x) if need_weight else x.new_empty(0, dtype=torch.float32)
    return dx, sums


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
