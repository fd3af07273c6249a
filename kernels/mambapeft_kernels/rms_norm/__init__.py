"""Residual addition, drop path and RMSNorm."""

from mambapeft_kernels.rms_norm.api import add_rms_norm

__all__ = ["add_rms_norm"]
