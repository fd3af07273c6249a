"""The depthwise convolution + SiLU in CUDA C++ (conv.cu): every row of x is read once for all taps and directions."""

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc

_FILES = ("common.cuh", "causal_conv1d/conv.cu")


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


def _launch(
    name: str,
    filters: tuple[list[Tensor], list[Tensor], tuple[bool, ...]],
    before: list[Tensor],
    after: list[Tensor | None],
    strided: list[Tensor],
    need_filters: bool = False,
) -> None:
    """Runs a kernel on [.., B, L, E] tensors: those before and after the filters (weights, biases, directions).

    strided: x, and dx where the kernel writes it; the others are contiguous.
    """
    x, (weights, biases, reverse) = strided[0], filters
    batch, length, channels = x.shape
    index, number = nvrtc.index_type(*before, *after)
    macros: dict[str, int | str] = {
        "IO_BF16": int(x.dtype == torch.bfloat16),
        "ALIGNED": 1,
        "INDEX": index,
        "E": channels,
        "K": weights[0].shape[1],
        "G": len(reverse),
        "REV0": int(reverse[0]),
        "REV1": int(reverse[-1]),
        "NEED_W": int(need_filters),
        "XL": strided[0].stride(1),
        "GL": strided[-1].stride(1),
    }
    grid = ((channels + 255) // 256, _runs(length), batch)
    sample_strides = [number(t.stride(0)) for t in strided]
    arguments = [*before, *_pair(weights), *_pair(biases), *after, batch, length, *sample_strides]
    nvrtc.run(_FILES, name, macros, grid, 128, x.device, arguments)


def _runs(length: int) -> int:
    """Runs of tokens, one a thread; see conv.cu."""
    return (length + 15) // 16


def _pair(tensors: list[Tensor]) -> list[Tensor]:
    wide = [t.to(torch.float32) for t in tensors]
    return [wide[0], wide[-1]]


def conv_silu(x: Tensor, weights: list[Tensor], biases: list[Tensor], reverse: tuple[bool, ...]) -> Tensor:
    """See `mambapeft_kernels.causal_conv1d.triton_kernels.conv_silu`."""
    u = torch.empty(len(reverse), *x.shape, dtype=x.dtype, device=x.device)
    _launch("conv_forward", (weights, biases, reverse), [x], [u], [x])
    return u


def conv_backward(
    du: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    reverse: tuple[bool, ...],
    dx: Tensor | None,
    need_filters: bool,
) -> tuple[Tensor, ...]:
    """Fills dx [B, L, E] (if given) from du [G, B, L, E], through SiLU and the convolution of every direction.

    Returns: if `need_filters`, the filters' gradients [G, E, K] and the biases' [G, E], float32, in a fixed order.
    """
    (batch, length, channels), taps, partial = x.shape, weights[0].shape[1], None
    if need_filters:
        partial = x.new_empty(_runs(length), batch, len(reverse), taps + 1, channels, dtype=torch.float32)
    dx = torch.empty_like(x) if dx is None else dx
    _launch("conv_backward", (weights, biases, reverse), [du, x], [dx, partial], [x, dx], need_filters)
    if partial is None:
        return ()
    total = partial.flatten(0, 1).sum(0)
    return total[:, :taps].transpose(1, 2), total[:, taps]
