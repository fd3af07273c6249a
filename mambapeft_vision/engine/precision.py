"""The precision of a run: which one it is, PyTorch's switches for it, and the context that casts."""

from contextlib import AbstractContextManager

import torch


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` → bf16 on a GPU, fp32 elsewhere; other names stay as they are."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def apply_precision(precision: str) -> None:
    """Sets PyTorch's process-wide switches for float32 products on GPUs: full precision, or tf32."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def compute_dtype(precision: str) -> torch.dtype | None:
    """The dtype that `autocast` computes in; None: that of the weights."""
    return torch.bfloat16 if precision == "bf16" else None


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Casts to bfloat16 where `precision` is bf16; nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
