"""The mixer core with the portable Triton scans."""

from mambapeft_kernels.mixer import fused
from mambapeft_kernels.mixer.api import Direction
from torch import Tensor


def ssm_mixer(x: Tensor, z: Tensor, directions: tuple[Direction, ...], scale: float) -> Tensor:
    """See `mambapeft_kernels.ssm_mixer`."""
    return fused.run(x, z, directions, scale, scans="triton")
