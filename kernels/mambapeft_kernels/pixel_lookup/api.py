"""The one public function of the lookup."""

import torch
from torch import Tensor

from mambapeft_kernels.backends import FUSED, resolve_backend
from mambapeft_kernels.pixel_lookup import naive


def look_up(images: Tensor, table: Tensor, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Tensor:
    """out[b, c, h, w] = table[c, images[b, c, h, w]], rounded to `dtype`: any function of a pixel and its channel.

    Args:
        images: uint8 [B, C, H, W], any strides.
        table: float32 [C, 256], contiguous.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto".
    Returns: [B, C, H, W], contiguous.
    Raises: ValueError for shapes or dtypes that do not fit or a backend that cannot run here.
    """
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(f"look_up: images must be uint8 [B, C, H, W], got {images.dtype} {tuple(images.shape)}")
    if table.shape != (images.shape[1], 256) or table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(
            f"look_up: table must be float32 [{images.shape[1]}, 256] and contiguous for images "
            f"{tuple(images.shape)}, got {table.dtype} {tuple(table.shape)}"
        )
    if resolve_backend(backend, images.device) in FUSED:
        from mambapeft_kernels.pixel_lookup import triton_kernels as triton

        return triton.look_up(images, table, dtype)
    return naive.look_up(images, table, dtype)
