"""GELU behind a frozen linear map, which keeps the map's input instead of its output: mostly a quarter of the bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.backends import FUSED, resolve_for
from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients, transformed
from mambapeft_kernels.gelu.api import gelu, gelu_gradient


def gelu_of_frozen_linear(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """gelu(x weightᵀ + bias); the backward pass computes the map again. weight and bias get no gradient.

    On a GPU the product itself applies GELU to 16 bits, in cuBLAS's form by tanh. That is off by at most 5e-4, but what
    it reads is not rounded: against float64 the result is no less exact than that of two launches.

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
            if not (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and resolve_for(backend, x) in FUSED):
                return gelu(F.linear(x, weight, bias), backend)
            flat = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.T, use_gelu=True)
            return flat.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        if differentiated_again(grad):
            (dx,) = plain_gradients(lambda x: F.gelu(F.linear(x, weight, bias)), (x,), (True,), grad)
            return dx, None, None, None
        with no_autocast(x.device.type):
            dhidden = gelu_gradient(grad, F.linear(x, weight, bias), ctx.backend)
            return dhidden @ weight, None, None, None
