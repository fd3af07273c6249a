"""LayerNorm over the last dimension, alone or with residual addition and drop path."""

from mambapeft_kernels.layer_norm.api import add_branch, add_layer_norm, layer_norm

__all__ = ["add_branch", "add_layer_norm", "layer_norm"]
