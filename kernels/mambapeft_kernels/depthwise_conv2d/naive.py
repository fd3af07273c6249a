"""The definition of depthwise 3x3 convolution + SiLU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(conv(x)) of [B, H, W, E], one 3x3 filter a channel, zeros around the map; in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    maps = x.to(wide).permute(0, 3, 1, 2)
    out = F.conv2d(maps, weight.to(wide), None if bias is None else bias.to(wide), padding=1, groups=x.shape[-1])
    return F.silu(out).permute(0, 2, 3, 1).contiguous().to(x.dtype)
