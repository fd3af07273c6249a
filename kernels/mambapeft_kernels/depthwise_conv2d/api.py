"""The one public function of the depthwise convolution."""

from torch import Tensor

from mambapeft_kernels.backends import FUSED, backend_for
from mambapeft_kernels.depthwise_conv2d import naive


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """silu(conv(x)): one 3x3 filter a channel, stride 1, a border of zeros (VMamba, arXiv 2401.10166, figure 3).

    Args:
        x: [B, H, W, E], any strides. weight: [E, 1, 3, 3]. bias: [E] or None.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: [B, H, W, E] in x's dtype; sums are kept in at least float32.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.
    """
    if x.ndim != 4:
        raise ValueError(f"depthwise_conv_silu: x must be [B, H, W, E], got {tuple(x.shape)}")
    for name, tensor, shape in (("weight", weight, (x.shape[-1], 1, 3, 3)), ("bias", bias, (x.shape[-1],))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"depthwise_conv_silu: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    chosen = backend_for(backend, x)
    if chosen not in FUSED or not x.numel():
        return naive.depthwise_conv_silu(x, weight, bias)
    from mambapeft_kernels.depthwise_conv2d import fused

    return fused.depthwise_conv_silu(x, weight, bias, chosen)
