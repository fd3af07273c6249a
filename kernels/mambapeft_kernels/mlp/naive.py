"""The definition of the MLP."""

import torch.nn.functional as F
from torch import Tensor


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """down GELU(up x + up_bias) + down_bias, with the exact GELU; [..., D] → [..., D]."""
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)
