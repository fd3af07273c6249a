"""A low-rank update of a linear map's output, in place."""

from mambapeft_kernels.low_rank.api import low_rank_add, low_rank_product

__all__ = ["low_rank_add", "low_rank_product"]
