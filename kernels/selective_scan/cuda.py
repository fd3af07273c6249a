"""The selective scan in CUDA C++ (scan_forward.cu, scan_backward.cu): same functions as the Triton backend's."""

import ctypes

import torch
from mambapeft_kernels import nvrtc
from mambapeft_kernels.selective_scan.checkpoints import CHUNK, empty_checkpoints
from torch import Tensor

_FORWARD = ("common.cuh", "selective_scan/scan_forward.cu")
_BACKWARD = ("common.cuh", "selective_scan/scan_backward.cu")

# Launch choices, measured with scripts/bench_kernels.py: (compute capability, more than 16 states, extra gradients
# or a state offset) → resident blocks a multiprocessor that registers must allow, and decays kept in registers.
_TUNED: dict[tuple[tuple[int, int], bool, bool], dict[str, int]] = {}
_FALLBACK = {"lanes": 2, "forward_blocks": 3, "backward_blocks": 3, "store_decay": 4}


def _choice(device: torch.device, states: int, heavy: bool) -> dict[str, int]:
    return _TUNED.get((torch.cuda.get_device_capability(device), states > 16, heavy), _FALLBACK)


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of every tensor can be read in 16-byte pieces."""
    for t in tensors:
        if t is None:
            continue
        whole_rows = t.stride(-1) == 1 and t.shape[-1] % 8 == 0 and all(s % 8 == 0 for s in t.stride()[:-1])
        if not whole_rows or t.data_ptr() % 16:
            return False
    return True


def _wide(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Both directions' small weights as float32; the same tensor twice for one direction."""
    wide = [t if t is None else t.to(torch.float32).contiguous() for t in tensors]
    return [wide[0], wide[-1]]


def _strides(t: Tensor) -> list[ctypes.c_longlong]:
    return [ctypes.c_longlong(s) for s in t.stride()]


def _bits(reverse: tuple[bool, ...]) -> int:
    return sum(int(r) << i for i, r in enumerate(reverse))


def _check_dtype(u: Tensor) -> None:
    if u.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kernel=cuda takes float32 or bfloat16, got {u.dtype}; choose kernel=triton")


def scan_forward(
    u: Tensor,
    delta: Tensor,
    bc: Tensor,
    z: Tensor,
    A_log: list[Tensor],
    D: list[Tensor],
    state_offset: list[Tensor | None],
    output_offset: list[Tensor | None],
    reverse: tuple[bool, ...],
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mambapeft_kernels.selective_scan.triton.scan_forward`."""
    _check_dtype(u)
    groups, batch, length, channels = u.shape
    states = A_log[0].shape[1]
    out = torch.empty(u.shape[1:], dtype=u.dtype, device=u.device)
    total = torch.empty_like(out) if save else out.new_empty(0)
    ckpt = empty_checkpoints(u, states) if save else out.new_empty(0, dtype=torch.float32)
    offset = any(t is not None for t in state_offset)
    choice = _choice(u.device, states, offset)
    macros = {
        "CHUNK": CHUNK,
        "IO_BF16": int(u.dtype == torch.bfloat16),
        "ALIGNED": int(_aligned(u, z)),
        "N": states,
        "P": choice["lanes"],
        "G": groups,
        "SAVE": int(save),
        "HAS_SO": int(offset),
        "MIN_BLOCKS": choice["forward_blocks"],
    }
    nvrtc.run(
        _FORWARD, "scan_forward", macros, ((channels + 63) // 64, batch), 32 * choice["lanes"] * groups, u.device,
        [u, delta, bc, z, *_wide(A_log), *_wide(D), *_wide(state_offset), *_wide(output_offset), out, total, ckpt,
         batch, length, channels, *_strides(z), scale, _bits(reverse)],
    )  # fmt: skip
    return out, total, ckpt


def scan_backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    bc: Tensor,
    z: Tensor,
    total: Tensor,
    ckpt: Tensor,
    A_log: list[Tensor],
    D: list[Tensor],
    state_offset: list[Tensor | None],
    reverse: tuple[bool, ...],
    scale: float,
    dz: Tensor | None,
    need_dA: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `mambapeft_kernels.selective_scan.triton.scan_backward`."""
    _check_dtype(u)
    groups, batch, length, channels = u.shape
    states = A_log[0].shape[1]
    block = 64 if states <= 16 else 32
    blocks = (channels + block - 1) // block
    du, draw = torch.empty_like(u), torch.empty_like(u)
    dbc = torch.empty(blocks, *bc.shape, dtype=torch.float32, device=u.device)
    dA = torch.empty(batch, groups, channels, states, dtype=torch.float32, device=u.device) if need_dA else None
    offset = any(t is not None for t in state_offset)
    choice = _choice(u.device, states, offset or need_dA)
    macros = {
        "CHUNK": CHUNK,
        "IO_BF16": int(u.dtype == torch.bfloat16),
        "ALIGNED": int(_aligned(u, z, dout, dz)),
        "N": states,
        "NEED_DZ": int(dz is not None),
        "NEED_DA": int(need_dA),
        "HAS_SO": int(offset),
        "STORE_DECAY": choice["store_decay"],
        "MIN_BLOCKS": choice["backward_blocks"],
    }
    nvrtc.run(
        _BACKWARD, "scan_backward", macros, (blocks, batch, groups), 128, u.device,
        [dout, u, delta, bc, z, total, ckpt, *_wide(A_log), *_wide(D), *_wide(state_offset), du, draw, dz, dbc, dA,
         batch, length, channels, *_strides(dout), *_strides(z), *_strides(z if dz is None else dz), scale,
         _bits(reverse)],
    )  # fmt: skip
    return du, draw, dbc, dA
