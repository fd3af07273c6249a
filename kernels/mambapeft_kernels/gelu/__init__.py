"""The Gaussian error linear unit."""

from mambapeft_kernels.gelu.api import gelu
from mambapeft_kernels.gelu.linear import gelu_of_frozen_linear

__all__ = ["gelu", "gelu_of_frozen_linear"]
