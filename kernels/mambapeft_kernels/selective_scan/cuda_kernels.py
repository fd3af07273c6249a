"""The selective scan in CUDA C++ (scan_forward.cu, scan_backward.cu): same functions as the Triton backend's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc
from mambapeft_kernels.selective_scan.checkpoints import CHUNK, empty_checkpoints

_FORWARD = ("common.cuh", "selective_scan/scan_forward.cu")
_BACKWARD = ("common.cuh", "selective_scan/scan_backward.cu")
_BACKWARD_TENSOR = ("common.cuh", "selective_scan/scan_backward_tensor.cu")

# Launch choices by compute capability, measured with scripts/bench_kernels.py; they change no result beyond rounding.
# Forward: (more than 16 states, keeps checkpoints) → lanes of a channel pair, blocks that registers leave room for.
# Backward: (more than 16 states, dA or a state offset) → decays kept in registers, such blocks.
_H100 = {
    "forward": {
        (False, False): {"P": 2, "MIN_BLOCKS": 4},
        (False, True): {"P": 2, "MIN_BLOCKS": 4},
        (True, False): {"P": 2, "MIN_BLOCKS": 2},
        (True, True): {"P": 2, "MIN_BLOCKS": 2},
    },
    "backward": {
        (False, False): {"STORE_DECAY": 6, "MIN_BLOCKS": 3},
        (False, True): {"STORE_DECAY": 2, "MIN_BLOCKS": 3},
        (True, False): {"STORE_DECAY": 0, "MIN_BLOCKS": 3},
        (True, True): {"STORE_DECAY": 4, "MIN_BLOCKS": 2},
    },
}
_TUNED: dict[tuple[int, int], dict] = {(9, 0): _H100}
_FALLBACK = _H100  # other chips have the same register file; nobody has measured them


def _choice(device: torch.device, kernel: str, *key: bool) -> dict[str, int]:
    return _TUNED.get(torch.cuda.get_device_capability(device), _FALLBACK)[kernel][key]


def _backward_layout(states: int, dtype: torch.dtype) -> tuple[int, int]:
    """Lanes of a channel pair and states of a lane: the smallest product that holds the states."""
    if states <= 16:
        return 4, 4
    # Six states a lane need more shared memory than a block has by default, where inputs are float32.
    return (4, 6) if states <= 24 and dtype == torch.bfloat16 else (8, 4)


def _on_tensor_cores(u: Tensor, states: int) -> bool:
    """Whether scan_backward_tensor.cu takes the scan of these u [G, B, L, E]: bfloat16, whole tiles of its products."""
    return u.dtype == torch.bfloat16 and states == 16 and u.shape[-1] % 64 == 0


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of every tensor can be read in 16-byte pieces."""
    for t in tensors:
        if t is None:
            continue
        whole_rows = t.stride(-1) == 1 and t.shape[-1] % 8 == 0 and all(s % 8 == 0 for s in t.stride()[:-1])
        if not whole_rows or t.data_ptr() % 16:
            return False
    return True


def _wide(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Both directions' small weights as float32; the same tensor twice for one direction."""
    wide = [t if t is None else t.to(torch.float32).contiguous() for t in tensors]
    return [wide[0], wide[-1]]


def _lines(**tensors: Tensor) -> dict[str, int]:
    """Macros: strides of a token and of a channel of [B, L, E] tensors, e.g. ZL and ZE of z."""
    lines = {f"{name}L": t.stride(1) for name, t in tensors.items()}
    return lines | {f"{name}E": t.stride(2) for name, t in tensors.items()}


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
    """See `mambapeft_kernels.selective_scan.triton_kernels.scan_forward`."""
    _check_dtype(u)
    groups, batch, length, channels = u.shape
    states = A_log[0].shape[1]
    out = torch.empty(u.shape[1:], dtype=u.dtype, device=u.device)
    total = torch.empty_like(out) if save else out.new_empty(0)
    ckpt = empty_checkpoints(u, states) if save else out.new_empty(0)
    offset = any(t is not None for t in state_offset)
    choice = _choice(u.device, "forward", states > 16, save)
    index, number = nvrtc.index_type(u, z, ckpt, bc)
    macros: dict[str, int | str] = {
        "CHUNK": CHUNK,
        "IO_BF16": int(u.dtype == torch.bfloat16),
        "ALIGNED": int(_aligned(u, z)),
        "N": states,
        "E": channels,
        "INDEX": index,
        **_lines(Z=z),
        "G": groups,
        "SAVE": int(save),
        "HAS_SO": int(offset),
        **choice,
    }
    nvrtc.run(
        _FORWARD, "scan_forward", macros, ((channels + 63) // 64, batch), 32 * choice["P"] * groups, u.device,
        [u, delta, bc, z, *_wide(A_log), *_wide(D), *_wide(state_offset), *_wide(output_offset), out, total, ckpt,
         batch, length, number(z.stride(0)), scale, _bits(reverse)],
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
    """See `mambapeft_kernels.selective_scan.triton_kernels.scan_backward`."""
    _check_dtype(u)
    groups, batch, length, channels = u.shape
    states = A_log[0].shape[1]
    lanes, per_lane = _backward_layout(states, u.dtype)
    block = 256 // lanes
    blocks = (channels + block - 1) // block
    du, draw = torch.empty_like(u), torch.empty_like(u)
    dbc = torch.empty(blocks, *bc.shape, dtype=u.dtype, device=u.device)
    dA = torch.empty(batch, groups, channels, states, dtype=torch.float32, device=u.device) if need_dA else None
    offset = any(t is not None for t in state_offset)
    written = z if dz is None else dz
    index, number = nvrtc.index_type(dout, u, bc, z, ckpt, dz, dbc, dA)
    strides = [number(t.stride(0)) for t in (dout, z, written)]
    shape: dict[str, int | str] = {
        "CHUNK": CHUNK,
        "IO_BF16": int(u.dtype == torch.bfloat16),
        "ALIGNED": int(_aligned(u, z, dout, dz)),
        "N": states,
        "E": channels,
        "INDEX": index,
        **_lines(O=dout, Z=z, G=written),
        "NEED_DZ": int(dz is not None),
    }
    if shape["ALIGNED"] and _on_tensor_cores(u, states) and not offset and not need_dA:
        nvrtc.run(
            _BACKWARD_TENSOR, "scan_backward_tensor", shape, (blocks, batch, groups), 128, u.device,
            [dout, u, delta, bc, z, total, ckpt, *_wide(A_log), *_wide(D), du, draw, dz, dbc,
             batch, length, *strides, scale, _bits(reverse)],
        )  # fmt: skip
        return du, draw, dbc, None
    macros: dict[str, int | str] = {
        **shape,
        "P": lanes,
        "ST": per_lane,
        "NEED_DA": int(need_dA),
        "HAS_SO": int(offset),
        **_choice(u.device, "backward", states > 16, offset or need_dA),
    }
    nvrtc.run(
        _BACKWARD, "scan_backward", macros, (blocks, batch, groups), 128, u.device,
        [dout, u, delta, bc, z, total, ckpt, *_wide(A_log), *_wide(D), *_wide(state_offset), du, draw, dz, dbc, dA,
         batch, length, *strides, scale, _bits(reverse)],
    )  # fmt: skip
    return du, draw, dbc, dA
