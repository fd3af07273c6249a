"""Kernels of the Vision Mamba block and beside it; installs as `mambapeft_kernels`.

Imports torch and (where present) triton or cuda-core only, and knows neither the backbone nor PEFT.
Every op has a `naive.py` that is its definition, and one file for each faster backend; products.py is cuBLAS alone.
"""

from mambapeft_kernels.backends import BACKENDS, FUSED, available_backends, describe, resolve_backend
from mambapeft_kernels.compile_ahead import BlockSizes, compile_ahead
from mambapeft_kernels.low_rank import low_rank_add
from mambapeft_kernels.matmul import product
from mambapeft_kernels.pixel_lookup import look_up
from mambapeft_kernels.rms_norm import add_rms_norm
from mambapeft_kernels.ssm_mixer import Direction, ssm_mixer

__all__ = [
    "BACKENDS",
    "FUSED",
    "BlockSizes",
    "Direction",
    "add_rms_norm",
    "available_backends",
    "compile_ahead",
    "describe",
    "look_up",
    "low_rank_add",
    "product",
    "resolve_backend",
    "ssm_mixer",
]
