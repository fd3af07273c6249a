"""Depthwise 3x3 convolution + SiLU over a channel-last map."""

from mambapeft_kernels.depthwise_conv2d.api import depthwise_conv_silu

__all__ = ["depthwise_conv_silu"]
