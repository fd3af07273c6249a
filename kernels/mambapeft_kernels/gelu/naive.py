"""The definition of GELU, which is PyTorch's."""

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), Φ the distribution function of the normal distribution (arXiv 1606.08415)."""
    return F.gelu(x)
