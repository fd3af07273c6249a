"""The scans of `ss2d` in CUDA C++ (scan_forward.cu, scan_backward.cu), for one state a channel in bfloat16.

What else there is (float32, more states, channels that do not come in sixteens) the Triton kernels do, which also find
the states of segments.
"""

import torch
from torch import Tensor

from mambapeft_kernels import nvrtc
from mambapeft_kernels.ss2d import triton_kernels as triton
from mambapeft_kernels.ss2d.api import DIRECTIONS

_FORWARD = ("common.cuh", "ss2d/scan.cuh", "ss2d/scan_forward.cu")
_BACKWARD = ("common.cuh", "ss2d/scan.cuh", "ss2d/scan_backward.cu")

_WARP, _SAMPLES = 16, 4  # channels of a warp, samples of a block
_STEPS = 8  # of a chunk
_WARPS = (6, 4, 8, 3, 2, 1)  # of a block, best first
# Warps that keep an H200 busy. With fewer, directions get blocks of their own; then sequences are cut into segments.
WANTED_WARPS = 132 * 20
# Blocks of six warps that registers leave room for, measured with scripts/bench_ss2d.py.
_MIN_BLOCKS = {"forward": 4, "backward": 2}


def takes(u: Tensor, states: int, rank: int) -> bool:
    """Whether these kernels do it."""
    return u.dtype == torch.bfloat16 and states == 1 and rank % 2 == 0 and u.shape[-1] % _WARP == 0 and rank <= 64


def pitch(rank: int) -> int:
    """Elements of a direction in a row of `proj`: [δ | B | C | zeros], so that every one begins at 16 bytes."""
    return (rank + 2 + 7) // 8 * 8


class Scans:
    """As `triton_kernels.Scans`, for a `proj` whose rows have `pitch` elements a direction.

    Where there are enough samples one block scans several directions and adds up their outputs, so that fewer `planes`
    are left to be added up.
    """

    adds_skip = True

    def __init__(self, u: Tensor, proj: Tensor, weight: Tensor, bias: Tensor, A: Tensor, offset: Tensor | None) -> None:
        batch, height, width, channels = u.shape
        self.u, self.proj, self.offset, self.A = u, proj, offset, A
        self.batch, self.length, self.channels, self.rank = batch, height * width, channels, weight.shape[-1]
        self.weights = weight.float(), bias, A
        self.warps = next(w for w in _WARPS if channels % (_WARP * w) == 0)
        self.tiles, self.groups = channels // (_WARP * self.warps), -(-batch // _SAMPLES)
        warps = self.groups * channels // _WARP
        self.planes = next((n for n in (1, 2) if warps * n >= WANTED_WARPS), DIRECTIONS)
        wanted = max(1, WANTED_WARPS // max(1, warps * DIRECTIONS)) if self.planes == DIRECTIONS else 1
        self._segments = triton.Scans(u, proj, weight, bias, A, None, segments=wanted)
        self.segments = self._segments.segments
        self.chunks = self._segments.chunks * self._segments.tile["BLOCK_T"] // _STEPS
        if self.segments == 1:
            self.chunks = -(-self.length // _STEPS)
        self.macros: dict[str, int | str] = {
            "IO_BF16": 1, "ALIGNED": 1, "HEIGHT": height, "WIDTH": width, "E": channels, "R": self.rank,
            "PP": pitch(self.rank), "WARPS": self.warps, "HAS_OFFSET": int(offset is not None),
            "EXACT": int(batch % _SAMPLES == 0),
            "OFFSET": "u32" if u.numel() * u.element_size() * self.planes < 2**32 else "unsigned long long",
        }  # fmt: skip

    def forward(self, skip: Tensor, first: Tensor | None, save: bool) -> tuple[Tensor, Tensor]:
        """As `triton_kernels.Scans.forward`, [planes, B, L, E]; skip [E] · u is in the sum of the planes."""
        y = self._planes()
        ckpt = self.u.new_empty(self.checkpoint_shape if save else (0,))
        self._run(
            _FORWARD, "forward", {"SAVE": int(save), "HAS_FIRST": int(first is not None)},
            [self.u, self.proj, *self.weights, skip, first, self.offset, *self._segments.segment_states(None), y, ckpt],
        )  # fmt: skip
        return y, ckpt

    def backward(self, dy: Tensor, skip: Tensor, ckpt: Tensor, need: dict[str, bool]) -> dict[str, Tensor]:
        """As `triton_kernels.Scans.backward`; skip [E] · dy is in the sum of the planes of "u"."""
        parts, cells = self.batch * self.segments, (DIRECTIONS, 1, self.channels)
        wide = {
            "weight": (self.groups * self.segments, DIRECTIONS, self.channels, self.rank),
            "bias": (parts, DIRECTIONS, self.channels),
            "A": (parts, *cells),
            "first": (parts, *cells),
            "offset": (parts, *cells),
        }
        out = {
            "u": self._planes() if need["u"] else self.u.new_empty(0),
            "proj": self.u.new_empty((self.tiles, *self.proj.shape) if need["proj"] else 0),
            **{name: self.A.new_empty(shape if need[name] else (0,)) for name, shape in wide.items()},
        }
        self._run(
            _BACKWARD, "backward", {f"NEED_{name.upper()}": int(need[name]) for name in out} | {"HAS_FIRST": 0},
            [dy, self.u, self.proj, *self.weights, skip, self.offset, *self._segments.segment_states(dy), ckpt,
             *out.values()],
        )  # fmt: skip
        return triton.summed(out, need, self.batch, self.segments)

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Of the states that the forward keeps: one in every 8 steps."""
        return self.batch, DIRECTIONS, self.segments * self.chunks, 1, self.channels

    def _planes(self) -> Tensor:
        return self.u.new_empty(self.planes, self.batch, self.length, self.channels)

    def _run(self, files: tuple[str, ...], name: str, more: dict[str, int], arguments: list) -> None:
        more = more | {"MIN_BLOCKS": max(1, _MIN_BLOCKS[name] * 6 // self.warps), "SHARED": self._shared_bytes(name)}
        grid = self.tiles * self.planes, self.groups, self.segments
        nvrtc.run(
            files, f"ss2d_{name}", self.macros | more, grid, 32 * self.warps, self.u.device,
            [*arguments, self.batch, self.chunks, self.planes], shared=more["SHARED"],
        )  # fmt: skip

    def _shared_bytes(self, name: str) -> int:
        """Of a block: `struct Shared` in the kernels' files."""
        rows, tile = _SAMPLES * _STEPS, _WARP * self.warps + 8
        row = pitch(self.rank) if pitch(self.rank) // 8 % 2 else pitch(self.rank) + 8
        tiles = 4 * rows if name == "forward" else 6 * rows + (self.rank + 7) // 8 * 8
        return 2 * (2 * rows * row + tiles * tile) + 96
