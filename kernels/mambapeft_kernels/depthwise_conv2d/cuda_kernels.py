"""The depthwise convolution in CUDA C++ (conv.cu), for an even number of channels; Triton has gradients of filters."""

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc

# Kernel → its file, and the rows of a map that a thread owns.
_KERNELS = {"depthwise": ("conv.cu", 2), "depthwise_back": ("conv_back.cu", 4)}
_FORWARD, _THROUGH_SILU, _INPUT_GRADIENT = 0, 1, 2  # MODE of conv.cu
_WARPS = 4  # of a block


def takes(x: Tensor) -> bool:
    """Whether these kernels do it."""
    return x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] % 2 == 0


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(conv(x)), [B, H, W, E] contiguous."""
    return _run("depthwise", x, None, weight, bias, MODE=_FORWARD)


def through_silu(du: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of conv(x) from the gradient of its SiLU; conv(x) is recomputed."""
    return _run("depthwise", x, du, weight, bias, MODE=_THROUGH_SILU)


def input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from the gradient of conv(x)."""
    return _run("depthwise", g, None, weight, None, MODE=_INPUT_GRADIENT)


def input_gradient_at_once(du: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of x from the gradient of silu(conv(x)), in one launch."""
    return _run("depthwise_back", x, du, weight, bias)


def _run(kernel: str, x: Tensor, du: Tensor | None, weight: Tensor, bias: Tensor | None, **more: int) -> Tensor:
    """more: further macros."""
    batch, height, width, channels = x.shape
    out = torch.empty_like(x)
    macros: dict[str, int | str] = {
        "IO_BF16": int(x.dtype == torch.bfloat16),
        "ALIGNED": 1,
        "HEIGHT": height,
        "WIDTH": width,
        "E": channels,
        "HAS_BIAS": int(bias is not None),
        **more,
    }
    file, rows = _KERNELS[kernel]
    items = batch * (-(-height // rows))
    grid = -(-items // _WARPS), -(-channels // 64)
    wide = (None if t is None else t.float().contiguous() for t in (weight, bias))
    nvrtc.run(
        ("common.cuh", f"depthwise_conv2d/{file}"), kernel, macros, grid, 32 * _WARPS, x.device,
        [x, du, *wide, out, batch],
    )  # fmt: skip
    return out
