"""One optimiser step on a batch: launched kernel by kernel, or recorded once as a CUDA graph and replayed.

At batch 32 a step of Vim-S is some 700 kernels of 15 µs on average, which Python cannot launch at the pace at which a
GPU runs them. A recorded step is launched as one, computes the same bits, and reads everything that changes from
the device: its images, the learning rates, the random seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import frozen_casts
from mambapeft_vision.engine.predict import after_failed_recording, autocast, compute_dtype, no_garbage_collection

# Steps launched one by one before one is recorded: kernels compile, libraries load, the optimiser makes its state.
WARM_UP = 3
# How many steps the host may be ahead of the device: enough to keep it busy, few enough to stop soon after a bad one.
AHEAD = 8


@dataclass(frozen=True)
class StepSettings:
    """precision: fp32, tf32 or bf16; clip_norm: of the global gradient; micro_batch: images per pass, None for all.

    record: whether to record CUDA graphs (on a GPU); rank: of this process among those that share the batches;
    reduce: sums a list of tensors over them, in place.
    """

    precision: str
    clip_norm: float | None
    micro_batch: int | None = None
    record: bool = True
    rank: int = 0
    reduce: Callable[[list[Tensor]], None] | None = None


class TrainStep:
    """Trains `model` by one step a call: cross entropy, backward, clipping, `optimizer`.

    A step whose loss or gradient is not finite changes nothing, and neither does any later one: the weights stay those
    of the last good step (`failed` tells, `steps_done` counts the good ones).

    Args:
        normalise: from uint8 images to the model's input.
        optimizer: a fused AdamW; its learning rates are set with `set_learning_rates` before each step.
        note: told in one line when a step cannot be recorded.
    """

    def __init__(
        self,
        model: AdaptedModel,
        normalise: nn.Module,
        optimizer: Optimizer,
        settings: StepSettings,
        note: Callable[[str], None],
    ) -> None:
        self._model, self._normalise, self._optimizer = model, normalise, optimizer
        self._settings = settings
        self._note = note
        self._trained = list(model.trained().values())
        device = self._trained[0].device
        self._on_gpu = device.type == "cuda"
        _place(optimizer, device)
        # Read by the fused optimiser: where it is 1, the step is skipped.
        self._not_finite = optimizer.found_inf = torch.zeros((), device=device)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        # Copied to by every step, so that the host can look without waiting.
        self._signal = torch.zeros((), pin_memory=self._on_gpu)
        self._under_way: deque[torch.cuda.Event] = deque()
        self._records = settings.record and self._on_gpu
        self._graphs: dict[tuple[int, int], _Recorded] = {}  # by size, here and on all ranks
        self._launched: dict[tuple[int, int], int] = {}  # steps launched one by one
        self._pool = torch.cuda.graph_pool_handle() if self._records else None

    @property
    def is_recorded(self) -> bool:
        """Whether the latest batch size runs as a CUDA graph by now."""
        return bool(self._graphs)

    def __call__(self, images: Tensor, labels: Tensor, seed: int, whole: int | None = None) -> None:
        """One step.

        Args:
            images: uint8 [b, 3, H, W]; labels: int64 [b].
            seed: of this step's dropout and drop path.
            whole: images of this step on all ranks; default: b.
        """
        self._seed(seed + (self._settings.rank << 32))
        size = len(labels), len(labels) if whole is None else whole
        recorded = self._graphs.get(size)
        if recorded is None and self._records and self._is_warm(size):
            recorded = self._record(images, labels, size)
        if recorded is not None:
            recorded.replay(images, labels)
        else:
            self._launched[size] = self._launched.get(size, 0) + 1
            self._run(images, labels, size[1])
        if self._on_gpu:
            self._wait_for_older()

    def failed(self, wait: bool = False) -> bool:
        """Whether a step was not finite. Without `wait` the answer may lag behind the device."""
        if self._on_gpu and not wait:
            return bool(self._signal.item())
        return bool(self._not_finite.item())

    def take_totals(self) -> tuple[float, int, int]:
        """Sum of the losses over images, right answers and good steps since the last call; waits for the device."""
        totals = self._loss_sum.item(), int(self._correct.item()), int(self._steps.item())
        for counter in (self._loss_sum, self._correct, self._steps):
            counter.zero_()
        return totals

    def gradients(self, images: Tensor, labels: Tensor, seed: int) -> float:
        """Computes a whole batch's gradients here, takes no step, returns the loss: to look into a step that failed."""
        self._seed(seed)
        return self._backward(images, labels, len(labels))[0].item()

    def _seed(self, seed: int) -> None:
        """Seeds the CPU and the step's device. torch.manual_seed also notes every call, with a traceback, for each kind
        of device that is not there: a millisecond a step, and never freed.
        """
        torch.default_generator.manual_seed(seed)
        if self._on_gpu:
            torch.cuda.default_generators[self._not_finite.device.index].manual_seed(seed)

    def _wait_for_older(self) -> None:
        if len(self._under_way) == AHEAD:
            self._under_way.popleft().synchronize()
        self._under_way.append(torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True)))

    def release(self) -> None:
        """Gives the recorded steps and their memory back. NCCL waits for this before it lets a process group end."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._graphs.clear()
        self._under_way.clear()
        self._optimizer.zero_grad(set_to_none=True)  # gradients lie in the recorded steps' memory

    # One step

    def _run(self, images: Tensor, labels: Tensor, whole: int) -> None:
        with frozen_casts(self._model, compute_dtype(self._settings.precision)):
            sums = self._backward(images, labels, whole)
        if self._settings.reduce is not None:
            self._settings.reduce([sums, *(p.grad for p in self._trained if p.grad is not None)])
        loss, correct = sums
        self._loss_sum += loss * whole
        self._correct += correct.long()
        norm = self._clip()
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        self._not_finite.copy_(torch.maximum(self._not_finite, (~finite).float()))
        self._optimizer.step()
        self._steps += (1 - self._not_finite).long()
        self._signal.copy_(self._not_finite, non_blocking=True)

    def _backward(self, images: Tensor, labels: Tensor, whole: int) -> Tensor:
        """Fills the gradients; returns [sum of losses / whole, right answers], float64."""
        self._optimizer.zero_grad(set_to_none=True)
        size = self._settings.micro_batch or max(1, len(labels))
        sums = torch.zeros(2, dtype=torch.float64, device=images.device)
        for part, wanted in zip(images.split(size), labels.split(size)):
            with autocast(self._settings.precision, images.device):
                logits = self._model(self._normalise(part))
                loss = F.cross_entropy(logits, wanted, reduction="sum") / whole
            loss.backward()
            sums += torch.stack((loss.detach().double(), (logits.detach().argmax(dim=1) == wanted).sum().double()))
        return sums

    def _clip(self) -> Tensor:
        """Clips the gradients' global norm, if asked for, and returns it as it was."""
        if self._settings.clip_norm is not None:
            return nn.utils.clip_grad_norm_(self._trained, self._settings.clip_norm)
        return nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])

    # Recording

    def _is_warm(self, size: tuple[int, int]) -> bool:
        """Every size is launched once before it is recorded: the last batch of an epoch has kernels of its own."""
        return self._launched.get(size, 0) > 0 and sum(self._launched.values()) >= WARM_UP

    def _record(self, images: Tensor, labels: Tensor, size: tuple[int, int]) -> _Recorded | None:
        """Records a step for batches of this size; None, and never again, where that does not work."""
        inputs = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            self._optimizer.zero_grad(set_to_none=True)
            stream = torch.cuda.current_stream()
            with (
                no_garbage_collection(),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                self._run(*inputs, size[1])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._records = False
            self._graphs.clear()
            after_failed_recording(images.device)
            self._optimizer.zero_grad(set_to_none=True)
            self._note(
                f"the training step cannot be recorded as a CUDA graph ({first_cause(error)}); it is launched kernel "
                f"by kernel, which is slower and otherwise the same"
            )
            return None
        self._graphs[size] = recorded = _Recorded(graph, *inputs)
        return recorded


def first_cause(error: BaseException) -> str:
    """The first line of what went wrong first: the error of a recording hides what broke it off."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@dataclass(frozen=True)
class _Recorded:
    """A recorded step and the places where it reads its batch."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor

    def replay(self, images: Tensor, labels: Tensor) -> None:
        self.images.copy_(images, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        self.graph.replay()


def _place(optimizer: Optimizer, device: torch.device) -> None:
    """Makes an optimiser, perhaps just read from a checkpoint, fit its device: a graph reads the rates from there."""
    on_gpu = device.type == "cuda"
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if on_gpu else rate
        group["capturable"] = on_gpu
