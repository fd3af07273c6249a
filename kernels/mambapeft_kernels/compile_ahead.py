"""Compilation ahead of a run's first step, kernels side by side.

Launched one after another, kernels that a machine has never run also compile one after another: seconds in which the
GPU has nothing to do. Here each op of a block runs on zeros in a thread of its own; compilers release Python's lock.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from mambapeft_kernels.backends import FUSED
from mambapeft_kernels.low_rank import low_rank_add
from mambapeft_kernels.pixel_lookup import look_up
from mambapeft_kernels.rms_norm import add_rms_norm
from mambapeft_kernels.selective_scan.checkpoints import CHUNK, empty_checkpoints

_BATCH, _LENGTH = 2, 2 * CHUNK  # of the zeros; kernels are not specialised on either
# Which directions of a block's call read backwards.
_REVERSE = False, True


@dataclass(frozen=True)
class BlockSizes:
    """D width, E channels, N states, R dt_rank, K conv taps of a block."""

    width: int
    channels: int
    states: int
    rank: int
    taps: int


@cache
def compile_ahead(
    sizes: BlockSizes, scale: float, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[Future, ...]:
    """Starts to compile what training and testing launch of frozen blocks of two directions; once a process.

    What a method changes (more states, gradients of weights, ...) compiles when it is launched, and so do variants for
    batches that are no multiple of 4, whose drop-path factors are less aligned.

    Args:
        scale: of the block's sum of directions.
        dtype: of the activations.
        backend: a resolved one; only fused kernels compile.
    Returns: what to wait for with `concurrent.futures.wait`.
    """
    if device.type != "cuda" or backend not in FUSED:
        return ()
    work = tasks(sizes, scale, dtype, device, backend)
    executor = ThreadPoolExecutor(len(work), thread_name_prefix="compile ahead")
    futures = tuple(executor.submit(task) for task in work)
    executor.shutdown(wait=False)
    return futures


def tasks(
    sizes: BlockSizes, scale: float, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[Callable[[], object], ...]:
    """Functions that launch all of it together, those that compile longest first."""
    block = _Block(sizes, scale, dtype, device, backend)
    return (
        block.mixer_backward,
        block.mixer_forward,
        partial(block.norm, branch=True),
        partial(block.norm, branch=True, is_second=True),
        partial(block.norm, branch=True, is_last=True),
        partial(block.norm, branch=False),
        block.first_norm,
        partial(block.low_rank, rank=16),
        partial(block.low_rank, rank=4),
        block.images,
        block.product,
    )


class _Block:
    """The ops of a block on zeros."""

    def __init__(self, sizes: BlockSizes, scale: float, dtype: torch.dtype, device: torch.device, backend: str) -> None:
        from mambapeft_kernels.ssm_mixer import fused  # noqa: F401  (registers the ops)

        self._sizes, self._scale, self._dtype, self._backend = sizes, scale, dtype, backend
        self._activations = partial(torch.zeros, dtype=dtype, device=device)
        self._wide = partial(torch.zeros, dtype=torch.float32, device=device)

    def mixer_forward(self) -> None:
        for save in (True, False):
            torch.ops.mambapeft.mixer_forward(self._xz(), None, *self._directions(), self._scale, self._backend, save)

    def mixer_backward(self) -> None:
        shape = _BATCH, _LENGTH, self._sizes.channels
        dout, total = self._activations(shape), self._activations(shape)
        u, delta = self._activations(len(_REVERSE), *shape), self._activations(len(_REVERSE), *shape)
        bc = self._wide(len(_REVERSE), _BATCH, _LENGTH, 2 * self._sizes.states)
        checkpoints = empty_checkpoints(u, self._sizes.states).zero_()
        weights, present, reverse = self._directions()
        torch.ops.mambapeft.mixer_backward(
            dout, self._xz(), None, total, checkpoints, u, delta, bc, weights, present, reverse, self._scale,
            self._backend, True, False, [False] * len(weights),
        )  # fmt: skip

    def norm(self, branch: bool, is_second: bool = False, is_last: bool = False) -> None:
        """branch: with drop path; is_second: the residual is the frozen tokens; is_last: nothing uses the new one."""
        shape = _BATCH, _LENGTH, self._sizes.width
        hidden, residual = self._activations(shape).requires_grad_(), self._wide(shape)
        residual.requires_grad_(not is_second)
        branch_scale = self._wide(_BATCH) if branch else None
        outputs = add_rms_norm(hidden, residual, self._wide(self._sizes.width), 1e-5, branch_scale, self._backend)
        used = outputs[:1] if is_last else outputs
        torch.autograd.backward(used, [torch.zeros_like(output) for output in used])

    def first_norm(self) -> None:
        """Of the embedded tokens, which autocast leaves in float32; what they are is seldom trained."""
        tokens = self._wide(_BATCH, _LENGTH, self._sizes.width)
        add_rms_norm(tokens, None, self._wide(self._sizes.width), 1e-5, None, self._backend)

    def low_rank(self, rank: int) -> None:
        """Beside the half of in_proj that makes x. Ranks that are multiples of 16 share a variant, and others do."""
        out = self._activations(_BATCH * _LENGTH, 2 * self._sizes.channels)
        up = self._wide(self._sizes.channels, rank)
        low_rank_add(out[:, : len(up)], self._activations(len(out), rank), up, 1.0, self._backend)

    def images(self) -> None:
        """Their normalisation, in the dtype of the activations; pixels whose number is a multiple of 16."""
        pixels = self._wide(_BATCH, 3, 16, 16).to(torch.uint8)
        look_up(pixels, self._wide(3, 256), self._dtype, self._backend)

    def product(self) -> Tensor:
        """Loads cuBLAS."""
        return self._activations(16, 16) @ self._activations(16, 16)

    def _xz(self) -> Tensor:
        """x and z side by side, as in_proj makes them."""
        return self._activations(_BATCH, _LENGTH, 2 * self._sizes.channels)

    def _directions(self) -> tuple[list[Tensor], list[bool], list[bool]]:
        """The weights, one direction's after another's in the order of `Direction`; which of the fields there are: all
        but the two offsets; and which direction reads backwards.
        """
        s = self._sizes
        x_proj = self._activations(s.rank + 2 * s.states, s.channels)  # which a model brings in their dtype
        shapes = (s.channels, s.rank), (s.channels,), (s.channels, s.states), (s.channels,)
        weights = [self._wide(s.channels, s.taps), self._wide(s.channels), x_proj, *map(self._wide, shapes)]
        return weights * len(_REVERSE), ([True] * 7 + [False] * 2) * len(_REVERSE), list(_REVERSE)
