"""The definition of GELU, which is PyTorch's."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), Φ the distribution function of the normal distribution (arXiv 1606.08415)."""
    return F.gelu(x)


def gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad · (Φ(x) + x Φ'(x))."""
    return torch.ops.aten.gelu_backward(grad, x)
