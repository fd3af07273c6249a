"""The depthwise convolution + SiLU in CUDA C++ (conv.cu): every row of x is read once for all taps and directions."""

import ctypes

import torch
from mambapeft_kernels import nvrtc
from torch import Tensor

_FILES = ("common.cuh", "conv1d/conv.cu")


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels can read these [..., L, E] tensors: channels in pairs, and a sample within 2³¹ elements."""
    return all(
        t.dtype in (torch.float32, torch.bfloat16)
        and t.stride(-1) == 1
        and t.shape[-1] % 2 == 0
        and all(s % 2 == 0 for s in t.stride()[:-1])
        and t.data_ptr() % (2 * t.element_size()) == 0
        and t.stride(-2) * t.shape[-2] < 1 << 31
        for t in tensors
    )


def _launch(name: str, x: Tensor, reverse: tuple[bool, ...], taps: int, arguments: list) -> None:
    batch, length, channels = x.shape
    macros = {
        "IO_BF16": int(x.dtype == torch.bfloat16),
        "ALIGNED": 1,
        "K": taps,
        "G": len(reverse),
        "REV0": int(reverse[0]),
        "REV1": int(reverse[-1]),
    }
    grid = ((channels + 255) // 256, (length + 15) // 16, batch)
    nvrtc.run(_FILES, name, macros, grid, 128, x.device, arguments)


def _pair(tensors: list[Tensor]) -> list[Tensor]:
    wide = [t.to(torch.float32) for t in tensors]
    return [wide[0], wide[-1]]


def _strides(t: Tensor) -> list[ctypes.c_longlong]:
    return [ctypes.c_longlong(s) for s in t.stride()[:2]]


def conv_silu(x: Tensor, weights: list[Tensor], biases: list[Tensor], reverse: tuple[bool, ...]) -> Tensor:
    """See `mambapeft_kernels.conv1d.triton.conv_silu`."""
    u = torch.empty(len(reverse), *x.shape, dtype=x.dtype, device=x.device)
    arguments = [x, *_pair(weights), *_pair(biases), u, *x.shape, *_strides(x)]
    _launch("conv_forward", x, reverse, weights[0].shape[1], arguments)
    return u


def conv_silu_backward(
    du: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor], reverse: tuple[bool, ...], dx: Tensor
) -> None:
    """Fills dx [B, L, E] from du [G, B, L, E], through SiLU and the convolution of every direction."""
    arguments = [du, x, *_pair(weights), *_pair(biases), dx, *x.shape, *_strides(x), *_strides(dx)]
    _launch("conv_backward", x, reverse, weights[0].shape[1], arguments)
