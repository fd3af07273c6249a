"""The bidirectional core of a Vim mixer: convolution, input-dependent parameters, scans, gate, sum."""

from mambapeft_kernels.ssm_mixer import fused  # registers the ops; imports triton or cuda-core only when they run
from mambapeft_kernels.ssm_mixer.api import Direction, ssm_mixer

__all__ = ["Direction", "fused", "ssm_mixer"]
