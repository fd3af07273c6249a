"""Testing a model on a split: predictions, accuracy, loss, speed."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import frozen_casts
from mambapeft_vision.engine.cuda_graph import CaptureError, Graph, capture
from mambapeft_vision.engine.precision import autocast, compute_dtype
from mambapeft_vision.utils.atomic import atomic_path
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.progress import Progress, format_duration

PREDICTIONS_FILE = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """predicted, labels: int64 [n], in the order of the list file; loss: mean cross entropy."""

    predicted: Tensor
    labels: Tensor
    loss: float
    seconds: float  # decoding included

    @property
    def accuracy(self) -> float:
        """Top-1, 0 to 1."""
        return (self.predicted == self.labels).sum().item() / len(self.labels)

    @property
    def images_per_second(self) -> float:
        return len(self.labels) / self.seconds

    def save(self, folder: Path) -> None:
        with atomic_path(folder / PREDICTIONS_FILE) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, predicted=self.predicted.numpy(), labels=self.labels.numpy())


class Batches(Protocol):
    """Batches of (uint8 [b, 3, H, W], int64 [b]), whose number is known."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@torch.no_grad()
def predict(
    model: nn.Module,
    normalise: nn.Module,
    batches: Batches,
    *,
    precision: str,
    device: torch.device,
    console: Console,
    cuda_graph: bool = True,
) -> Predictions:
    """Runs `model` in evaluation mode over all batches.

    Args:
        cuda_graph: on a GPU, capture the forward pass of a whole batch and replay it.
    """
    model.eval().to(device)
    normalise.to(device)
    forward = _Forward(model, normalise, precision, cuda_graph and device.type == "cuda" and len(batches) > 2)
    predicted, labels, losses = [], [], []
    total, done = len(batches), 0
    started = time.monotonic()
    with frozen_casts(model, compute_dtype(precision)):
        for number, (images, targets) in enumerate(batches, start=1):
            logits = forward(_to(images, device))
            losses.append(F.cross_entropy(logits, _to(targets, device), reduction="sum").double())
            predicted.append(logits.argmax(dim=1))
            labels.append(targets)
            done += len(targets)
            if number > 1:
                predicted[-2] = predicted[-2].cpu()  # waits for the batch before, so that the host is one batch ahead
            console.live(_live_line(number, total, done, time.monotonic() - started))
    console.clear()
    return Predictions(
        predicted=torch.cat([p.cpu() for p in predicted]),
        labels=torch.cat([t.cpu() for t in labels]),
        loss=torch.stack(losses).sum().item() / done,
        seconds=time.monotonic() - started,
    )


class _Forward:
    """From uint8 images [b, 3, H, W] to float32 logits [b, classes].

    Captured at the first batch's size; smaller batches fill a part of it (no image's result depends on the others).
    """

    def __init__(self, model: nn.Module, normalise: nn.Module, precision: str, captures: bool) -> None:
        self._model, self._normalise, self._precision = model, normalise, precision
        self._captures = captures
        self._graph: Graph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self._graph is not None:
            return self._graph.replay(images)[: len(images)].clone()
        logits = self._run(images)  # also brings everything up that a capture must not wait for
        if self._captures:
            self._captures = False
            # A model that cannot be captured is launched kernel by kernel, as in training.
            with suppress(CaptureError, torch.OutOfMemoryError):
                self._graph = capture(self._run, images, device=images.device)
        return logits

    def _run(self, images: Tensor) -> Tensor:
        with autocast(self._precision, images.device):
            return self._model(self._normalise(images)).float()


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`; from the host without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _live_line(batch: int, batches: int, images: int, seconds: float) -> str:
    left = Progress(batch, batches, seconds).eta_seconds or 0.0
    return f"test batch {batch}/{batches}  {images / max(seconds, 1e-9):,.0f} images/s  {format_duration(left)} left"
