"""The last part of the mixer's backward in CUDA C++ (input_gradient.cu): x_proj, SiLU and convolution in one launch."""

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc

_FILES = ("common.cuh", "causal_conv1d/filter.cuh", "ssm_mixer/input_gradient.cu")
_BLOCK_CHANNELS, _BLOCK_RUNS, _THREADS = 128, 4, 128  # see input_gradient.cu


def supports(dproj: Tensor, x: Tensor, x_proj: list[Tensor], conv_weight: list[Tensor]) -> bool:
    """Whether the kernel can compute this gradient: bfloat16, channels in groups of 32, few columns and taps."""
    columns, channels, taps = dproj.shape[-1], x.shape[-1], conv_weight[0].shape[1]
    return (
        dproj.dtype == x.dtype == torch.bfloat16
        and channels % 32 == 0
        and columns % 2 == 0
        and columns <= 96
        and taps <= 4
        and x.stride(-1) == 1
        and all(stride % 4 == 0 for stride in x.stride()[:-1])
        and x.stride(-2) * x.shape[-2] < 1 << 31
        and all(w.dtype in (torch.bfloat16, torch.float32) for w in x_proj)
        and all(t.data_ptr() % 16 == 0 for t in (x, *x_proj, *conv_weight))
    )


def input_gradient(
    du: Tensor,
    dproj: Tensor,
    x: Tensor,
    x_proj: list[Tensor],
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    reverse: tuple[bool, ...],
    dx: Tensor,
) -> None:
    """Fills dx [B, L, E]: (du + dproj · x_proj) through SiLU and the convolution, summed over the directions.

    Args:
        du: [G, B, L, E], the scans' share of u's gradient.
        dproj: [G, B, L, R + 2N], the gradient of x_proj's output.
        dx: of x's dtype, each token's channels side by side.
    """
    batch, length, channels = x.shape
    weights = [w.to(torch.float32) for w in conv_weight]
    biases = [b.to(torch.float32) for b in conv_bias]
    index, number = nvrtc.index_type(du, x, dx)
    macros: dict[str, int | str] = {
        "IO_BF16": 1,
        "ALIGNED": 1,
        "WEIGHT_BF16": int(x_proj[0].dtype == torch.bfloat16),
        "INDEX": index,
        "E": channels,
        "K": weights[0].shape[1],
        "W": dproj.shape[-1],
        "G": len(reverse),
        "REV0": int(reverse[0]),
        "REV1": int(reverse[-1]),
        "XL": x.stride(1),
        "GL": dx.stride(1),
    }
    tokens = _BLOCK_RUNS * (17 - weights[0].shape[1])
    grid = ((channels + _BLOCK_CHANNELS - 1) // _BLOCK_CHANNELS, (length + tokens - 1) // tokens, batch)
    ends = [(tensors[0], tensors[-1]) for tensors in (x_proj, weights, biases)]
    filters = [tensor for pair in ends for tensor in pair]
    arguments = [du, dproj, x, *filters, dx, batch, length, number(x.stride(0)), number(dx.stride(0))]
    nvrtc.run(_FILES, "input_gradient", macros, grid, _THREADS, x.device, arguments)
