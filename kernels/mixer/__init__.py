"""The bidirectional core of a Vim mixer: convolution, input-dependent parameters, scans, gate, sum."""

from mambapeft_kernels.mixer.api import Direction, ssm_mixer

__all__ = ["Direction", "ssm_mixer"]
