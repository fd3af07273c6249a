"""A frozen MLP, whose hidden layer is recomputed in the backward pass."""

from mambapeft_kernels.mlp.api import frozen_mlp

__all__ = ["frozen_mlp"]
