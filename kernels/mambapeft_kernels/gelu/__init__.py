"""The Gaussian error linear unit."""

from mambapeft_kernels.gelu.api import gelu

__all__ = ["gelu"]
