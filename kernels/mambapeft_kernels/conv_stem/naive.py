"""The definition of convolution + LayerNorm + GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.layer_norm import naive


def conv_norm_gelu(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    padding: int,
    eps: float,
) -> Tensor:
    """gelu(LayerNorm(conv(images))), [B, H', W', C]; computed in at least float32, in `images`' dtype."""
    wide = torch.promote_types(images.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    maps = F.conv2d(images.to(wide), weight, bias, stride, padding).permute(0, 2, 3, 1)
    return F.gelu(naive.layer_norm(maps, norm_weight, norm_bias, eps)).to(images.dtype).contiguous()
