"""The depthwise convolution in CUDA C++ (conv.cu), for an even number of channels; Triton has gradients of filters."""

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc

_FILES = ("common.cuh", "depthwise_conv2d/conv.cu")
_FORWARD, _THROUGH_SILU, _INPUT_GRADIENT = 0, 1, 2  # MODE
_ROWS, _WARPS = 2, 4  # rows of a thread, warps of a block


def takes(x: Tensor) -> bool:
    """Whether these kernels do it."""
    return x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] % 2 == 0


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(conv(x)), [B, H, W, E] contiguous."""
    return _run(_FORWARD, x, None, weight, bias)


def through_silu(du: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of conv(x) from the gradient of its SiLU; conv(x) is recomputed."""
    return _run(_THROUGH_SILU, x, du, weight, bias)


def input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from the gradient of conv(x)."""
    return _run(_INPUT_GRADIENT, g, None, weight, None)


def _run(mode: int, x: Tensor, du: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, height, width, channels = x.shape
    out = torch.empty_like(x)
    macros: dict[str, int | str] = {
        "IO_BF16": int(x.dtype == torch.bfloat16),
        "ALIGNED": 1,
        "HEIGHT": height,
        "WIDTH": width,
        "E": channels,
        "HAS_BIAS": int(bias is not None),
        "MODE": mode,
    }
    items = batch * (-(-height // _ROWS))
    grid = -(-items // _WARPS), -(-channels // 64)
    wide = (None if t is None else t.float().contiguous() for t in (weight, bias))
    nvrtc.run(_FILES, "depthwise", macros, grid, 32 * _WARPS, x.device, [x, du, *wide, out, batch])
    return out
