"""Compilation ahead of a run's first step, kernels side by side.

Launched one after another, kernels that a machine has never run also compile one after another: seconds in which the
GPU has nothing to do. Here each op of a block runs on zeros in a thread of its own; compilers release Python's lock.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from mambapeft_kernels.backends import FUSED
from mambapeft_kernels.conv_stem import conv_norm_gelu
from mambapeft_kernels.depthwise_conv2d import depthwise_conv_silu
from mambapeft_kernels.gelu import gelu
from mambapeft_kernels.layer_norm import add_branch, add_layer_norm, layer_norm
from mambapeft_kernels.low_rank import low_rank_add, low_rank_product
from mambapeft_kernels.pixel_lookup import look_up
from mambapeft_kernels.rms_norm import add_rms_norm
from mambapeft_kernels.selective_scan.checkpoints import CHUNK, empty_checkpoints
from mambapeft_kernels.ss2d import SS2DWeights, ss2d_norm

_BATCH, _LENGTH = 2, 2 * CHUNK  # sizes of the zeros; kernels are not specialised on either
_MAPS = 4  # samples of VMamba's zeros: kernels know whether their number is a multiple of 4
# Which directions of a block's call read backwards.
_REVERSE = False, True

P = ParamSpec("P")
R = TypeVar("R")


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
    """Starts to compile the kernels that training and testing launch for frozen blocks of two directions.

    A process does this once for the same arguments.

    Kernel variants that only some methods need (extra states, weight gradients) compile at their first launch. So do
    variants for batches that are no multiple of 4, whose drop-path factors are less aligned.

    Args:
        scale: factor on the block's sum of directions.
        dtype: dtype of the activations.
        backend: a resolved one; only fused kernels compile.
    Returns: futures for `concurrent.futures.wait`.
    """
    if device.type != "cuda" or backend not in FUSED:
        return ()
    return _started(tasks(sizes, scale, dtype, device, backend))


@dataclass(frozen=True)
class StageSizes:
    """Height and width of the maps of a VMamba's stage; D width, E channels, N states, R dt_rank of its blocks."""

    height: int
    map_width: int
    width: int
    channels: int
    states: int
    rank: int


@cache
def compile_stages_ahead(
    stages: tuple[StageSizes, ...], dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[Future, ...]:
    """As `compile_ahead`, for frozen blocks of VMamba's stages."""
    if device.type != "cuda" or backend not in FUSED:
        return ()
    return _started(stage_tasks(stages, dtype, device, backend))


def stage_tasks(
    stages: tuple[StageSizes, ...], dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[Callable[[], object], ...]:
    """Functions that launch all of it together, those that compile longest first."""
    every = [_Stage(sizes, dtype, device, backend) for sizes in stages]
    each = (
        task
        for tasks_of in (
            lambda stage: (partial(stage.scans, train=True), partial(stage.scans, train=False)),
            lambda stage: (stage.convolution, stage.norms, stage.low_rank),
        )
        for stage in every
        for task in tasks_of(stage)
    )
    return *each, *(task for stage in every[:1] for task in (stage.stem, stage.gelu))  # one variant of GELU serves all


def _started(work: tuple[Callable[[], object], ...]) -> tuple[Future, ...]:
    create_launchers_one_at_a_time()
    executor = ThreadPoolExecutor(len(work), thread_name_prefix="compile ahead")
    futures = tuple(executor.submit(task) for task in work)
    executor.shutdown(wait=False)
    return futures


@cache
def create_launchers_one_at_a_time() -> None:
    """Makes it safe that several threads launch kernels of Triton for the first time.

    Until version 3.6 each signature's launcher is a C module of its own, and all have the same name. Python keeps one
    module object a name, and loading one of them again writes its functions into that object. So a thread that was
    interrupted between loading and reading could get the launcher of another kernel.
    """
    import triton

    driver = triton.runtime.driver.active
    driver.launcher_cls = one_at_a_time(driver.launcher_cls)


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which threads wait for."""
    lock = Lock()

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with lock:
            return function(*args, **kwargs)

    return call


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
        """The norm of the embedded tokens, which autocast leaves in float32 and which are seldom trained."""
        tokens = self._wide(_BATCH, _LENGTH, self._sizes.width)
        add_rms_norm(tokens, None, self._wide(self._sizes.width), 1e-5, None, self._backend)

    def low_rank(self, rank: int) -> None:
        """LoRA beside the half of in_proj that makes x. Multiples of 16 share a variant, and so do other ranks."""
        out = self._activations(_BATCH * _LENGTH, 2 * self._sizes.channels)
        up = self._wide(self._sizes.channels, rank)
        low_rank_add(out[:, : len(up)], self._activations(len(out), rank), up, 1.0, self._backend)

    def images(self) -> None:
        """The images' normalisation, in the activations' dtype, for numbers of pixels that are multiples of 16."""
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
        x_proj = self._activations(s.rank + 2 * s.states, s.channels)  # cast by the model
        shapes = (s.channels, s.rank), (s.channels,), (s.channels, s.states), (s.channels,)
        weights = [self._wide(s.channels, s.taps), self._wide(s.channels), x_proj, *map(self._wide, shapes)]
        return weights * len(_REVERSE), ([True] * 7 + [False] * 2) * len(_REVERSE), list(_REVERSE)


class _Stage:
    """The ops of a block of VMamba on zeros."""

    def __init__(self, sizes: StageSizes, dtype: torch.dtype, device: torch.device, backend: str) -> None:
        self._sizes, self._backend = sizes, backend
        self._activations = partial(torch.zeros, dtype=dtype, device=device)
        self._wide = partial(torch.zeros, dtype=torch.float32, device=device)

    def scans(self, train: bool) -> None:
        from mambapeft_kernels.layer_norm.triton_kernels import norm_of_sum  # imports Triton

        e, n, r = self._sizes.channels, self._sizes.states, self._sizes.rank
        weights = SS2DWeights(
            x_proj_weight=self._activations(4, r + 2 * n, e),  # cast by the model
            dt_projs_weight=self._wide(4, e, r),
            dt_projs_bias=self._wide(4, e),
            A_logs=self._wide(4 * e, n),
            Ds=self._wide(4 * e),
        )
        u = self._map(e).requires_grad_(train)
        ones = self._wide(e)
        self._back(ss2d_norm(u, weights, ones, ones, 1e-5, self._backend))
        for planes in (1, 2):  # the scans of so few samples left four
            norm_of_sum(torch.stack([u.detach()] * planes), ones, ones, 1e-5, train)

    def convolution(self) -> None:
        filters = self._wide(self._sizes.channels, 1, 3, 3)
        x = self._map(self._sizes.channels).requires_grad_()
        self._back(depthwise_conv_silu(x, filters, None, self._backend))

    def norms(self) -> None:
        """The norms of residual sums: with and without drop path, and the first of a stage; and that behind it."""
        ones, scale = self._wide(self._sizes.width), self._wide(_MAPS)
        hidden = self._map(self._sizes.width).requires_grad_()
        residual = hidden.detach().float().requires_grad_()
        for before, branch in ((residual, scale), (residual, None), (None, None)):
            outputs = add_layer_norm(hidden, before, ones, ones, 1e-5, branch, self._backend)
            self._back(*outputs)
            self._back(outputs[0])  # nothing uses the sum of the last norm
        for branch in (scale, None):  # before a stage's end
            self._back(add_branch(hidden, residual, branch, hidden.dtype, self._backend))
        self._back(layer_norm(hidden, ones, ones, 1e-5, self._backend, ones))  # behind a convolution
        hidden = hidden.detach()
        layer_norm(hidden, ones, ones, 1e-5, self._backend, ones)
        for before in (hidden, None):  # in inference
            add_layer_norm(hidden, before, ones, ones, 1e-5, None, self._backend, narrow=True)
        add_branch(hidden, hidden, None, hidden.dtype, self._backend)

    def low_rank(self) -> None:
        """LoRA beside in_proj."""
        out, x = (self._map(n).flatten(0, 2) for n in (self._sizes.channels, self._sizes.width))
        weight = self._activations(self._sizes.channels, self._sizes.width)
        for rank in (16, 4):
            up = self._wide(self._sizes.channels, rank)
            low_rank_product(out, x, weight, self._activations(len(out), rank), up, 1.0, self._backend)

    def stem(self) -> None:
        """The first layer in front of the first stage, for images of three channels."""
        width = self._sizes.width // 2
        images, ones = self._activations(_MAPS, 3, 4 * self._sizes.height, 4 * self._sizes.map_width), self._wide(width)
        conv_norm_gelu(images, self._wide(width, 3, 3, 3), ones, ones, ones, 2, 1, 1e-5, self._backend)

    def gelu(self) -> None:
        """The MLPs'; its kernels know of sizes only whether they are multiples of 16."""
        self._back(gelu(self._map(16).requires_grad_(), self._backend))

    def _map(self, channels: int) -> Tensor:
        return self._activations(_MAPS, self._sizes.height, self._sizes.map_width, channels)

    def _back(self, *outputs: Tensor) -> None:
        if outputs[0].requires_grad:
            torch.autograd.backward(outputs, [torch.zeros_like(t) for t in outputs], retain_graph=True)
