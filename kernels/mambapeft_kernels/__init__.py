"""Kernels of vision state-space models; installs as `mambapeft_kernels`.

Imports torch and (where present) triton or cuda-core only, and knows neither the backbone nor PEFT.
Every op has a `naive.py` that is its definition, and one file for each faster backend; products.py is cuBLAS alone.
"""

from mambapeft_kernels.backends import BACKENDS, FUSED, available_backends, describe, resolve_backend
from mambapeft_kernels.compile_ahead import BlockSizes, StageSizes, compile_ahead, compile_stages_ahead
from mambapeft_kernels.conv_stem import conv_norm_gelu
from mambapeft_kernels.depthwise_conv2d import depthwise_conv_silu
from mambapeft_kernels.gelu import gelu
from mambapeft_kernels.layer_norm import add_branch, add_layer_norm, layer_norm
from mambapeft_kernels.low_rank import low_rank_add
from mambapeft_kernels.matmul import product
from mambapeft_kernels.pixel_lookup import look_up
from mambapeft_kernels.rms_norm import add_rms_norm
from mambapeft_kernels.selective_scan import selective_scan
from mambapeft_kernels.ss2d import SS2DWeights, prefix_states, ss2d, ss2d_norm
from mambapeft_kernels.ssm_mixer import Direction, ssm_mixer

__all__ = [
    "BACKENDS",
    "FUSED",
    "BlockSizes",
    "Direction",
    "SS2DWeights",
    "StageSizes",
    "add_branch",
    "add_layer_norm",
    "add_rms_norm",
    "available_backends",
    "compile_ahead",
    "compile_stages_ahead",
    "conv_norm_gelu",
    "depthwise_conv_silu",
    "describe",
    "gelu",
    "layer_norm",
    "look_up",
    "low_rank_add",
    "prefix_states",
    "product",
    "resolve_backend",
    "selective_scan",
    "ss2d",
    "ss2d_norm",
    "ssm_mixer",
]
