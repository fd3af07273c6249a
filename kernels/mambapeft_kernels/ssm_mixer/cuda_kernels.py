"""Convolution, SiLU and x_proj in one launch, in CUDA C++: forward (input_projection.cu), and backward for x alone
(input_gradient.cu); the gradient of x_proj's output (projection_gradient.cu).
"""

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc

_SHARED = ("common.cuh", "ssm_mixer/tensor_cores.cuh", "causal_conv1d/filter.cuh")
_THREADS = 128


def supports(x: Tensor, x_proj: list[Tensor], conv_weight: list[Tensor], conv_bias: list[Tensor]) -> bool:
    """Whether the kernels can compute this: bfloat16, channels in groups of 32, few columns and taps."""
    columns, channels, taps = x_proj[0].shape[0], x.shape[-1], conv_weight[0].shape[1]
    return (
        x.dtype == torch.bfloat16
        and channels % 32 == 0
        and columns % 2 == 0
        and columns <= 88  # the warps' sums fit into shared memory
        and taps <= 4
        and x.stride(-1) == 1
        and all(stride % 8 == 0 for stride in x.stride()[:-1])
        and x.stride(-2) * x.shape[-2] < 1 << 31
        and all(w.dtype in (torch.bfloat16, torch.float32) for w in x_proj)
        and all(t.data_ptr() % 16 == 0 for t in (x, *x_proj, *conv_weight, *conv_bias))
    )


def input_projection(
    x: Tensor,
    x_proj: list[Tensor],
    rank: int,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    reverse: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """u = SiLU(conv(x)) [G, B, L, E]; of u x_projᵀ the low-rank Δ [G, B, L, R] in x's dtype and B|C in float32."""
    groups, (batch, length), columns = len(reverse), x.shape[:2], x_proj[0].shape[0]
    u = x.new_empty(groups, *x.shape)
    low = x.new_empty(groups, batch, length, rank)
    bc = x.new_empty(groups, batch, length, columns - rank, dtype=torch.float32)
    index, number = nvrtc.index_type(u, x, bc)
    runs = batch * -(-length // 4)  # of tokens, eight a block; see input_projection.cu
    arguments = [x, *_ends(x_proj), *_ends(conv_weight, torch.float32), *_ends(conv_bias, torch.float32), u, low, bc]
    nvrtc.run(
        (*_SHARED, "ssm_mixer/input_projection.cu"),
        "input_projection",
        {**_macros(x, x_proj, conv_weight, reverse), "INDEX": index, "R": rank},
        (groups, -(-runs // 8)),
        _THREADS,
        x.device,
        [*arguments, batch, length, number(x.stride(0))],
    )
    return u, low, bc


def supports_projection_gradient(draw: Tensor, dt_proj: list[Tensor], dbc: Tensor) -> bool:
    """Whether `projection_gradient` can compute this."""
    return (
        draw.dtype == dbc.dtype == torch.bfloat16
        and draw.shape[-1] % 32 == 0
        and dbc.shape[-1] % 4 == 0
        and dt_proj[0].shape[1] <= 64
        and all(w.dtype in (torch.bfloat16, torch.float32) for w in dt_proj)
    )


def projection_gradient(draw: Tensor, dt_proj: list[Tensor], dbc: Tensor) -> Tensor:
    """The gradient of x_proj's output [dt | B | C], [G, B, L, R + 2N].

    Args:
        draw: [G, B, L, E], the gradient of Δ before softplus.
        dbc: [P, G, B, L, 2N], partial sums of the gradients of B|C.
    """
    groups, batch, length, channels = draw.shape
    rank, pair_states = dt_proj[0].shape[1], dbc.shape[-1]
    dproj = draw.new_empty(groups, batch, length, rank + pair_states)
    index, number = nvrtc.index_type(draw, dbc, dproj)
    warps = 8 if rank <= 40 else 4  # their sums fit into shared memory
    macros: dict[str, int | str] = {
        "IO_BF16": 1,
        "ALIGNED": 1,
        "WEIGHT_BF16": int(dt_proj[0].dtype == torch.bfloat16),
        "INDEX": index,
        "E": channels,
        "R": rank,
        "S": pair_states,
        "PARTS": len(dbc),
        "WARPS": warps,
    }
    tokens = batch * length
    nvrtc.run(
        (*_SHARED[:2], "ssm_mixer/projection_gradient.cu"),
        "projection_gradient",
        macros,
        (-(-tokens // 32), groups),
        32 * warps,
        draw.device,
        [draw, *_ends(dt_proj), dbc, dproj, tokens, number(dbc.stride(0))],
    )
    return dproj


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
    index, number = nvrtc.index_type(du, x, dx)
    tokens = 4 * (17 - conv_weight[0].shape[1])  # of a block; see input_gradient.cu
    filters = [*_ends(x_proj), *_ends(conv_weight, torch.float32), *_ends(conv_bias, torch.float32)]
    nvrtc.run(
        (*_SHARED, "ssm_mixer/input_gradient.cu"),
        "input_gradient",
        {**_macros(x, x_proj, conv_weight, reverse), "INDEX": index, "GL": dx.stride(1)},
        (-(-channels // 128), -(-length // tokens), batch),
        _THREADS,
        x.device,
        [du, dproj, x, *filters, dx, batch, length, number(x.stride(0)), number(dx.stride(0))],
    )


def _macros(
    x: Tensor, x_proj: list[Tensor], conv_weight: list[Tensor], reverse: tuple[bool, ...]
) -> dict[str, int | str]:
    return {
        "IO_BF16": 1,
        "ALIGNED": 1,
        "WEIGHT_BF16": int(x_proj[0].dtype == torch.bfloat16),
        "E": x.shape[-1],
        "K": conv_weight[0].shape[1],
        "W": x_proj[0].shape[0],
        "G": len(reverse),
        "REV0": int(reverse[0]),
        "REV1": int(reverse[-1]),
        "XL": x.stride(1),
    }


def _ends(tensors: list[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Both directions' tensors; the same one twice for one direction."""
    ends = tensors[0], tensors[-1]
    return ends if dtype is None else (ends[0].to(dtype), ends[1].to(dtype))
