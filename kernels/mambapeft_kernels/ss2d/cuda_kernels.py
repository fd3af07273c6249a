"""The scans of `ss2d` in CUDA C++ (scan_forward.cu, scan_backward.cu), for one state a channel in bfloat16.

The Triton kernels do all other cases: float32, more states, numbers of channels that are no multiple of 16.
"""

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc
from mambapeft_kernels.ss2d.api import DIRECTIONS, SS2DWeights
from mambapeft_kernels.ss2d.gradients import summed

_WARP, _SAMPLES = 16, 4  # channels of a warp, samples of a block
_STEPS = 8  # steps of a chunk
_WARPS = (6, 4, 8, 3, 2, 1)  # warps of a block, best first
# Blocks of six warps that registers leave room for on a multiprocessor.
_MIN_BLOCKS = {"forward": 4, "backward": 2, "ends": 4}
# Warps that keep an H200 busy. With fewer, directions get blocks of their own; then sequences are cut into segments.
WANTED_WARPS = {"forward": 2_600, "backward": 1_500}
MIN_CHUNKS = 8  # chunks of a segment


def takes(u: Tensor, states: int, rank: int) -> bool:
    """Whether these kernels do it."""
    return u.dtype == torch.bfloat16 and states == 1 and rank % 2 == 0 and u.shape[-1] % _WARP == 0 and rank <= 64


def pitch(rank: int) -> int:
    """Elements of a direction in a row of `proj`: [δ | B | C | zeros], so that every one begins at 16 bytes."""
    return (rank + 2 + 7) // 8 * 8


class Scans:
    """Launches the scans over one u.

    Where there are enough samples one block scans several directions and adds up their outputs, so that fewer than four
    planes are left to be added up.

    Args:
        u: [B, H, W, E] contiguous. proj: [B, H·W, 4 `pitch`] contiguous, u's dtype.
        w: weights of all directions; x_proj_weight is in `proj` already.
    """

    adds_skip = True  # Σ D · u is in the planes

    def __init__(self, u: Tensor, proj: Tensor, w: SS2DWeights) -> None:
        batch, height, width, channels = u.shape
        self.u, self.proj = u, proj
        self.batch, self.length, self.channels, self.rank = batch, height * width, channels, w.dt_projs_weight.shape[2]
        if proj.shape[-1] != DIRECTIONS * pitch(self.rank):
            raise ValueError(f"ss2d: expected {pitch(self.rank)} rows of x_proj a direction; pad the weight")
        self.weights = [t.float().contiguous() for t in (w.dt_projs_weight, w.dt_projs_bias, w.A_logs)]
        self.skip = w.Ds.float().contiguous()
        # [4, E, 1] and [4, E] are the same.
        self.first, self.offset = (None if t is None else t.float().contiguous() for t in w[-2:])
        self.warps = next(n for n in _WARPS if channels % (_WARP * n) == 0)
        self.tiles, self.groups = channels // (_WARP * self.warps), -(-batch // _SAMPLES)
        self._warps_a_direction = self.groups * channels // _WARP
        chunks = -(-self.length // _STEPS)
        missing = WANTED_WARPS["backward"] // max(1, self._warps_a_direction * DIRECTIONS)
        self.chunks = -(-chunks // max(1, min(missing, chunks // MIN_CHUNKS)))
        self.segments = -(-chunks // self.chunks)
        self.macros: dict[str, int | str] = {
            "IO_BF16": 1, "ALIGNED": 1, "HEIGHT": height, "WIDTH": width, "E": channels, "R": self.rank,
            "PP": pitch(self.rank), "WARPS": self.warps, "EXACT": int(batch % _SAMPLES == 0),
            "OFFSET": "u32" if u.numel() * u.element_size() < 2**32 else "unsigned long long",
        }  # fmt: skip

    def forward(self, save: bool) -> tuple[Tensor, Tensor]:
        """The outputs [planes, B, L, E], whose sum counts; if `save`, the states entering chunks [B, 4, chunks, E]."""
        planes = self._planes("forward")
        y = self.u.new_empty(planes, self.batch, self.length, self.channels)
        ckpt = self.u.new_empty(self.checkpoint_shape if save else (0,))
        self._run(
            "forward", planes, self.segments,
            {"SAVE": int(save), "HAS_FIRST": int(self.first is not None), "HAS_OFFSET": int(self.offset is not None)},
            [self.u, self.proj, *self.weights, self.skip, self.first, self.offset, *self._ends(None), y, ckpt],
            [planes],
        )  # fmt: skip
        return y, ckpt

    def backward(self, dy: Tensor, ckpt: Tensor, need: dict[str, bool]) -> dict[str, Tensor]:
        """The gradients that `need` names, as `triton_kernels.Scans.backward`; "u" [planes, B, L, E] with Σ D · dy."""
        planes, parts, cells = self._planes("backward"), self.batch * self.segments, (DIRECTIONS, 1, self.channels)
        narrow = {
            "u": (planes, self.batch, self.length, self.channels),
            "proj": (self.tiles, *self.proj.shape),
        }
        wide = {
            "weight": (self.groups * self.segments, DIRECTIONS, self.channels, self.rank),
            "bias": (parts, DIRECTIONS, self.channels),
            "A": (parts, *cells),
            "first": (parts, *cells),
            "offset": (parts, *cells),
        }
        out = {name: self.u.new_empty(shape if need[name] else (0,)) for name, shape in narrow.items()}
        out |= {name: self.skip.new_empty(shape if need[name] else (0,)) for name, shape in wide.items()}
        self._run(
            "backward", planes, self.segments,
            {f"NEED_{name.upper()}": int(need[name]) for name in out} | {"HAS_OFFSET": int(self.offset is not None)},
            [dy, self.u, self.proj, *self.weights, self.skip, self.offset, *self._ends(dy), ckpt, *out.values()],
            [planes],
        )  # fmt: skip
        return summed(out, need, self.batch, self.segments)

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """The shape of the states that the forward keeps: one in every 8 steps."""
        return self.batch, DIRECTIONS, self.segments * self.chunks, self.channels

    def _planes(self, name: str) -> int:
        """Parts of the output: all directions in one block, two, or each in its own."""
        if self.segments > 1:  # segments of two directions are different places
            return DIRECTIONS
        return next((n for n in (1, 2) if self._warps_a_direction * n >= WANTED_WARPS[name]), DIRECTIONS)

    def _ends(self, dy: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each segment's effect on the state before it (with dy: on the adjoint behind it); empty for one segment."""
        shape = (self.batch, DIRECTIONS, self.segments, self.channels) if self.segments > 1 else (0,)
        decay, end = self.skip.new_empty(shape), self.skip.new_empty(shape)
        if self.segments > 1:
            inputs = [self.u if dy is None else dy, self.proj, *self.weights, decay, end]
            self._run("ends", DIRECTIONS, self.segments - 1, {"ADJOINT": int(dy is not None)}, inputs)
        return decay, end

    def _run(
        self,
        name: str,
        planes: int,
        segments: int,
        more: dict[str, int],
        arguments: list,
        last: list[int] | None = None,
    ) -> None:
        shared = self._shared_bytes(name)
        blocks = max(1, _MIN_BLOCKS[name] * 6 // self.warps)
        macros = self.macros | more | {"MIN_BLOCKS": blocks, "SHARED": shared}
        nvrtc.run(
            ("common.cuh", "ss2d/scan.cuh", f"ss2d/scan_{name}.cu"), f"ss2d_{name}", macros,
            (self.tiles * planes, self.groups, segments), 32 * self.warps, self.u.device,
            [*arguments, self.batch, self.chunks, *(last or [])], shared=shared,
        )  # fmt: skip

    def _shared_bytes(self, name: str) -> int:
        """Bytes of shared memory of a block: `struct Shared` in the kernels' files."""
        rows, tile = _SAMPLES * _STEPS, _WARP * self.warps + 8
        row = pitch(self.rank) if pitch(self.rank) // 8 % 2 else pitch(self.rank) + 8
        tiles = {"forward": 4, "ends": 2, "backward": 10}[name] * rows
        buffers, places = 2, 96
        if name == "backward":
            tiles += (self.rank + 7) // 8 * 8
            buffers, places = 3, 128
        return 2 * (buffers * rows * row + tiles * tile) + places
