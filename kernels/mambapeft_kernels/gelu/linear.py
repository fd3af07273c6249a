"""GELU behind a frozen linear map, which keeps the map's input instead of its output: mostly a quarter of the bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients, transformed
from mambapeft_kernels.gelu.api import gelu, gelu_gradient


def gelu_of_frozen_linear(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """gelu(x weightᵀ + bias); the backward pass computes the map again. weight and bias get no gradient.

    Args:
        x: [..., in]. weight: [out, in] and bias: [out] in x's dtype.
        backend: as in `gelu`.
    Returns: [..., out].
    """
    if transformed() or torch.compiler.is_compiling():
        return gelu(F.linear(x, weight, bias), backend)
    return _GeluOfLinear.apply(x, weight, bias, backend)


class _GeluOfLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight, bias)
        ctx.backend = backend
        with no_autocast(x.device.type):
            return gelu(F.linear(x, weight, bias), backend)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        if differentiated_again(grad):
            (dx,) = plain_gradients(lambda x: F.gelu(F.linear(x, weight, bias)), (x,), (True,), grad)
            return dx, None, None, None
        with no_autocast(x.device.type):
            dhidden = gelu_gradient(grad, F.linear(x, weight, bias), ctx.backend)
            return dhidden @ weight, None, None, None
