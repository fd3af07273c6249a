"""The first layer of a convolutional stem: convolution, LayerNorm over the channels and GELU."""

from mambapeft_kernels.conv_stem.api import conv_norm_gelu

__all__ = ["conv_norm_gelu"]
