"""The one public function of the frozen MLP."""

from torch import Tensor

from mambapeft_kernels.backends import FUSED, backend_for
from mambapeft_kernels.mlp import naive


def frozen_mlp(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, backend: str = "auto"
) -> Tensor:
    """down GELU(up x + up_bias) + down_bias, with the exact GELU (arXiv 1606.08415). Only x gets a gradient.

    The fused kernels keep x alone for the backward pass and compute the hidden layer again there.

    Args:
        x: [..., D], any floating dtype. up: [H, D]. up_bias: [H]. down: [D, H]. down_bias: [D].
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: [..., D] in x's dtype, to which weights are rounded before the products.
    Raises: ValueError for shapes that do not fit each other, for weights that require a gradient, or for a backend
        that cannot run here.
    """
    hidden, width = len(up), x.shape[-1]
    expected = {
        "up": (up, (hidden, width)),
        "up_bias": (up_bias, (hidden,)),
        "down": (down, (width, hidden)),
        "down_bias": (down_bias, (width,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"frozen_mlp: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.requires_grad:
            raise ValueError(f"frozen_mlp: {name} requires a gradient, which this op does not compute; use F.linear")
    weights = [tensor.to(x.dtype) for tensor in (up, up_bias, down, down_bias)]
    if backend_for(backend, x) not in FUSED:
        return naive.mlp(x, *weights)
    from mambapeft_kernels.mlp import triton_kernels as triton

    return triton.mlp(x, *weights)
