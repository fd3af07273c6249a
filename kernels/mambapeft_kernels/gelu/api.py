"""The one public function of GELU."""

from torch import Tensor

from mambapeft_kernels.backends import FUSED, resolve_for
from mambapeft_kernels.derivatives import transformed
from mambapeft_kernels.gelu import naive


def gelu(x: Tensor, backend: str = "auto") -> Tensor:
    """x Φ(x), Φ the distribution function of the normal distribution; not its approximation by tanh.

    Args:
        x: any shape; 16-bit activations are computed in float32 and rounded once.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: a tensor of x's shape and dtype.
    Raises: ValueError for a backend that cannot run here.
    """
    if resolve_for(backend, x) in FUSED and not transformed():
        from mambapeft_kernels.gelu import triton_kernels as triton

        return triton.gelu(x)
    return naive.gelu(x)


def gelu_gradient(grad: Tensor, x: Tensor, backend: str = "auto") -> Tensor:
    """The gradient of x from `grad`, that of gelu(x); for functions with a backward pass of their own."""
    if resolve_for(backend, x) in FUSED and not transformed():
        from mambapeft_kernels.gelu import triton_kernels as triton

        return triton.gelu_gradient(grad, x)
    return naive.gelu_gradient(grad, x)
