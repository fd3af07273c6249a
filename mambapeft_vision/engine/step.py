"""One optimiser step on a batch: launched kernel by kernel, or captured once as a CUDA graph and replayed.

At batch 32 a step of Vim-S is some 700 kernels of 15 µs on average, which Python cannot launch at the pace at which a
GPU runs them. A captured step is launched as one, computes the same bits, and reads everything that changes from
the device: its images, the learning rates, the random seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import frozen_casts
from mambapeft_vision.engine import cuda_graph
from mambapeft_vision.engine.objective import right_answers, summed_loss
from mambapeft_vision.engine.precision import autocast, compute_dtype

# Steps launched one by one before one is captured: kernels compile, libraries load, the optimiser makes its state.
WARM_UP = 3
# How many steps the host may be ahead of the device: enough to keep it busy, few enough to stop soon after a bad one.
AHEAD = 8


@dataclass(frozen=True)
class StepSettings:
    """How a step is taken.

    Args:
        precision: fp32, tf32 or bf16.
        clip_norm: largest global norm of the gradient; None: no clipping.
        micro_batch: images a pass, None for all.
        capture: whether to capture CUDA graphs, on a GPU.
        rank: rank of this process among the processes that share the batches.
        reduce: sums a list of tensors over them, in place.
    """

    precision: str
    clip_norm: float | None
    micro_batch: int | None = None
    capture: bool = True
    rank: int = 0
    reduce: Callable[[list[Tensor]], None] | None = None


class TrainStep:
    """Trains `model` by one step a call: loss (objective.py), backward, clipping, `optimizer`.

    A step whose loss or gradient is not finite changes nothing, and neither does any later one: the weights stay those
    of the last good step (`failed` tells, `take_totals` counts the good ones).

    Args:
        normalise: from uint8 images to the model's input.
        optimizer: a fused AdamW; its learning rates are set with `set_learning_rates` before each step.
        note: called with one line when a step cannot be captured.
        after_backward: called when the gradients of a batch are there, before they are looked at; in a captured step
            only while it is captured.
    """

    def __init__(
        self,
        model: AdaptedModel,
        normalise: nn.Module,
        optimizer: Optimizer,
        settings: StepSettings,
        note: Callable[[str], None],
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._normalise, self._optimizer = model, normalise, optimizer
        self._settings = settings
        self._after_backward = after_backward
        self._trained = list(model.trained().values())
        self._device = device = self._trained[0].device
        self._on_gpu = device.type == "cuda"
        cuda_graph.fit_to_device(optimizer, device)
        self._not_finite = torch.zeros((), device=device)
        cuda_graph.skip_where(optimizer, self._not_finite)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        # Copied to by every step, so that the host can look without waiting.
        self._signal = torch.zeros((), pin_memory=self._on_gpu)
        self._under_way: deque[torch.cuda.Event] = deque()
        self._graphed = cuda_graph.GraphedStep(
            self._run, self._free_gradients, device, enabled=settings.capture, warm_up=WARM_UP, note=note
        )

    @property
    def is_captured(self) -> bool:
        """Whether some batch size runs as a CUDA graph by now."""
        return self._graphed.is_captured

    def __call__(self, images: Tensor, labels: Tensor, seed: int, whole: int | None = None) -> None:
        """One step.

        Args:
            images: uint8 [b, C, H, W].
            labels: int64 [b], or float32 [b, classes] of 0 and 1 where images have several.
            seed: seed of this step's dropout and drop path.
            whole: images of this step on all ranks; default: b.
        """
        cuda_graph.seed(self._device, seed + (self._settings.rank << 32))
        self._graphed(images, labels, constants=(len(labels) if whole is None else whole,))
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
        cuda_graph.seed(self._device, seed)
        return self._backward(images, labels, len(labels))[0].item()

    def release(self) -> None:
        """Gives the captured steps and their memory back. NCCL waits for this before it lets a process group end."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._under_way.clear()
        self._graphed.release()

    def _wait_for_older(self) -> None:
        if len(self._under_way) == AHEAD:
            self._under_way.popleft().synchronize()
        self._under_way.append(torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True)))

    def _free_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)  # they lie in the captured steps' memory

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
                loss = summed_loss(logits, wanted) / whole
            loss.backward()
            sums += torch.stack((loss.detach().double(), right_answers(logits.detach(), wanted).double()))
        self._after_backward()
        return sums

    def _clip(self) -> Tensor:
        """Clips the gradients' global norm, if asked for, and returns it as it was."""
        if self._settings.clip_norm is not None:
            return nn.utils.clip_grad_norm_(self._trained, self._settings.clip_norm)
        return nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
