"""The two-dimensional selective scan of VMamba: four reading orders of one map, summed."""

from mambapeft_kernels.ss2d import fused  # registers the ops; imports triton only when they run
from mambapeft_kernels.ss2d.api import SS2DWeights, prefix_states, ss2d, ss2d_norm

__all__ = ["SS2DWeights", "fused", "prefix_states", "ss2d", "ss2d_norm"]
