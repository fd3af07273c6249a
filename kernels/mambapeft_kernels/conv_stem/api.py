"""The one public function of the stem's first layer."""

import torch
from torch import Tensor

from mambapeft_kernels.backends import FUSED, backend_for
from mambapeft_kernels.conv_stem import naive
from mambapeft_kernels.derivatives import transformed


def conv_norm_gelu(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    padding: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """gelu(LayerNorm(conv(images))), the norm over the channels of each place (VMamba, arXiv 2401.10166, figure 3).

    The fused kernel has no backward pass: where a tensor requires a gradient, the definition runs.

    Args:
        images: [B, I, H, W]. weight: [C, I, k, k]. bias, norm_weight, norm_bias: [C]; bias may be None.
        stride, padding: of both sides; around the images there are zeros.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: [B, H', W', C], contiguous, in `images`' dtype, with H' = (H + 2 padding - k) // stride + 1.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.
    """
    if images.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (images.shape[1], weight.shape[2], weight.shape[2]):
        raise ValueError(
            f"conv_norm_gelu: expected images [B, I, H, W] and weight [C, I, k, k], got {tuple(images.shape)} and "
            f"{tuple(weight.shape)}"
        )
    for name, vector in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"conv_norm_gelu: {name} has shape {tuple(vector.shape)}, expected [{weight.shape[0]}]")
    tensors = images, weight, bias, norm_weight, norm_bias
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if backend_for(backend, images) in FUSED and images.numel() and not differentiable and not transformed():
        from mambapeft_kernels.conv_stem import triton_kernels as triton

        if triton.takes(images, weight):
            return triton.conv_norm_gelu(*tensors, stride, padding, eps)
    return naive.conv_norm_gelu(*tensors, stride, padding, eps)
