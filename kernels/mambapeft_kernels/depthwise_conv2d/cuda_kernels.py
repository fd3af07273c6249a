"""The depthwise convolution in CUDA C++, for an even number of channels; Triton has gradients of filters."""

from typing import NamedTuple

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc


class _Kernel(NamedTuple):
    file: str
    name: str
    rows: int  # of a thread
    mode: int  # the macro MODE


_FORWARD, _THROUGH_SILU, _INPUT_GRADIENT = (_Kernel("conv.cu", "depthwise", 2, mode) for mode in range(3))
_BACKWARD = _Kernel("conv_back.cu", "depthwise_back", 4, 3)
_WARPS = 4  # of a block


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


def backward(du: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of x from that of silu(conv(x)): `through_silu` and `input_gradient` in one launch."""
    return _run(_BACKWARD, x, du, weight, bias)


def _run(kernel: _Kernel, x: Tensor, du: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, height, width, channels = x.shape
    out = torch.empty_like(x)
    macros: dict[str, int | str] = {
        "IO_BF16": int(x.dtype == torch.bfloat16),
        "ALIGNED": 1,
        "HEIGHT": height,
        "WIDTH": width,
        "E": channels,
        "HAS_BIAS": int(bias is not None),
        "MODE": kernel.mode,
        "ROWS": kernel.rows,
    }
    items = batch * (-(-height // kernel.rows))
    blocks = -(-items // _WARPS) * -(-channels // 64)
    wide = (None if t is None else t.float().contiguous() for t in (weight, bias))
    files = "common.cuh", "depthwise_conv2d/place.cuh", f"depthwise_conv2d/{kernel.file}"
    nvrtc.run(files, kernel.name, macros, (blocks,), 32 * _WARPS, x.device, [x, du, *wide, out, batch])
    return out
