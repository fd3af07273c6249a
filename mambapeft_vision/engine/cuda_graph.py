"""CUDA graphs: work that is launched kernel by kernel, captured once, and then replayed as one launch.

The one place that captures. The names that PyTorch does not document, which a step needs to compute in a graph the
bits that it computes without one, are used here and nowhere else; tests/engine/test_cuda_graph.py has a test for each.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class CaptureError(RuntimeError):
    """Work that cannot be captured. The message is the first line of the first cause."""


@dataclass(frozen=True)
class Graph:
    """Captured work with its static inputs and outputs: a replay reads the inputs and overwrites the outputs."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Any

    def replay(self, *values: Tensor) -> Any:
        """Runs the work on `values`, which may have fewer rows than the inputs that were captured."""
        for place, value in zip(self.inputs, values, strict=True):
            place[: len(value)].copy_(value, non_blocking=True)
        self.graph.replay()
        return self.output


def capture(function: Callable[..., Any], *inputs: Tensor, device: torch.device, pool: Any = None) -> Graph:
    """Captures `function(*inputs)`; nothing is computed before the first replay.

    The function must have run before: a capture cannot wait for kernels to compile or libraries to load.

    Args:
        pool: memory that several graphs share (`torch.cuda.graph_pool_handle()`); None: memory of its own.

    Raises:
        CaptureError: for a function that waits for the device, among others. Kernels can be launched again afterwards.
        torch.OutOfMemoryError: passed on unchanged.
    """
    places = tuple(tensor.clone() for tensor in inputs)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # The default stream cannot be captured; PyTorch takes one of its own instead.
    stream = None if current == torch.cuda.default_stream(device) else current
    try:
        with (
            _no_garbage_collection(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            output = function(*places)
    except Exception as error:
        _restore_random_generator(device)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CaptureError(first_cause(error)) from error
    # Capturing writes the generator's present seed to the device, on PyTorch's own stream. On a busy GPU that can come
    # after the seed of the first replay, which then draws what an earlier step has drawn.
    torch.cuda.synchronize(device)
    return Graph(graph, places, output)


class GraphedStep:
    """A training step: launched while everything warms up, then captured once for each size and replayed.

    Args:
        step: called with the inputs and then the constants; returns nothing.
        reset: called before each capture, after a failed one and at the end; frees what lies in the graphs' memory.
        enabled: whether to capture, on a GPU. A step that cannot be captured is launched for good.
        warm_up: launches of any size before the first capture.
        note: called with one line where a step cannot be captured.
    """

    def __init__(
        self,
        step: Callable[..., None],
        reset: Callable[[], None],
        device: torch.device,
        *,
        enabled: bool,
        warm_up: int,
        note: Callable[[str], None],
    ) -> None:
        self._step, self._reset, self._device = step, reset, device
        self._captures = enabled and device.type == "cuda"
        self._warm_up = warm_up
        self._note = note
        self._graphs: dict[tuple[int, ...], Graph] = {}  # by rows of the inputs and constants
        self._launched: Counter[tuple[int, ...]] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    @property
    def is_captured(self) -> bool:
        """Whether some size is replayed by now."""
        return bool(self._graphs)

    def __call__(self, *inputs: Tensor, constants: tuple[int, ...] = ()) -> None:
        size = (*map(len, inputs), *constants)
        if size not in self._graphs and self._captures and self._is_warm(size):
            self._capture(size, inputs, constants)
        if size in self._graphs:
            self._graphs[size].replay(*inputs)
        else:
            self._launched[size] += 1
            self._step(*inputs, *constants)

    def release(self) -> None:
        """Gives the graphs and their memory back."""
        self._graphs.clear()
        self._reset()

    def _is_warm(self, size: tuple[int, ...]) -> bool:
        """Every size is launched once before it is captured: the last batch of an epoch has kernels of its own."""
        return self._launched[size] > 0 and self._launched.total() >= self._warm_up

    def _capture(self, size: tuple[int, ...], inputs: tuple[Tensor, ...], constants: tuple[int, ...]) -> None:
        def step(*places: Tensor) -> None:
            self._step(*places, *constants)

        self._reset()
        try:
            self._graphs[size] = capture(step, *inputs, device=self._device, pool=self._pool)
        except CaptureError as error:
            self._captures = False
            self.release()
            self._note(
                f"the training step cannot be captured as a CUDA graph ({error}); it is launched kernel by kernel, "
                f"which is slower and otherwise the same"
            )


def first_cause(error: BaseException) -> str:
    """The first line of the first error in a chain: a capture's own error hides the one that interrupted it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disables the collector during a capture: freeing device memory of an earlier run would abort it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Undocumented parts of PyTorch


def seed(device: torch.device, value: int) -> None:
    """Seeds the CPU and `device`, also for the next replay.

    torch.manual_seed also notes every call, with a traceback, for each kind of device that is not there: a millisecond
    a step, and never freed.
    """
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)


def fit_to_device(optimizer: Optimizer, device: torch.device) -> None:
    """Makes an optimiser, perhaps just read from a checkpoint, fit for graphs: they read its rates on the device."""
    on_gpu = device.type == "cuda"
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if on_gpu else rate
        group["capturable"] = on_gpu


def skip_where(optimizer: Optimizer, flag: Tensor) -> None:
    """Makes a fused optimiser skip every step during which `flag`, a scalar on its device, is 1."""
    # PyTorch's gradient scaler sets it in the same way.
    optimizer.found_inf = flag  # type: ignore[attr-defined]


def _restore_random_generator(device: torch.device) -> None:
    """After a failed capture the device's random generator still waits for its end."""
    torch.cuda.synchronize(device)
    torch.cuda.default_generators[device.index].graphsafe_set_state(torch.Generator(device))
