"""Testing a model on a split: predictions, accuracy, loss, speed."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mambapeft_vision.adapter.predict import probabilities_of
from mambapeft_vision.backbones.contract import frozen_casts
from mambapeft_vision.engine.cuda_graph import CaptureError, Graph, capture
from mambapeft_vision.engine.objective import mean_average_precision, summed_loss
from mambapeft_vision.engine.precision import autocast, compute_dtype
from mambapeft_vision.utils.atomic import atomic_path
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.progress import Progress, format_duration

AHEAD = 2  # batches that are copied while the GPU works on the ones before
# Classes whose probabilities are kept: all of them but for the largest tasks, so that runs can be averaged.
TOP = 128


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for test images, in the order of the list file.

    Args:
        predicted: int64 [n], the class of the largest logit.
        labels: int64 [n], or float32 [n, classes] of 0 and 1 where images have several.
        classes, probabilities: int64 and float32 [n, k], the k most probable classes (at most `TOP`; all of them where
            images have several labels), the most probable first.
        loss: mean (binary) cross entropy.
        seconds: decoding included.
        average_precision: mean over classes, where images have several labels; else None.
    """

    predicted: Tensor
    labels: Tensor
    classes: Tensor
    probabilities: Tensor
    loss: float
    seconds: float
    average_precision: float | None = None

    @property
    def accuracy(self) -> float:
        """Top-1, 0 to 1; where images have several labels the mean average precision."""
        if self.average_precision is not None:
            return self.average_precision
        return (self.predicted == self.labels).sum().item() / len(self.labels)

    @property
    def images_per_second(self) -> float:
        return len(self.labels) / self.seconds

    def save(self, file: Path, names: Sequence[str], class_names: Sequence[str] | None) -> None:
        """Writes the arrays with the names of images and, where there are some, of classes."""
        arrays = {
            "predicted": self.predicted.numpy(),
            "labels": self.labels.numpy() if self.labels.ndim == 1 else self.labels.byte().numpy(),
            "top_classes": self.classes.int().numpy(),
            "top_probabilities": self.probabilities.numpy(),
            "names": np.array(names, dtype=np.str_),
        }
        if class_names is not None:
            arrays["class_names"] = np.array(class_names, dtype=np.str_)
        with atomic_path(file) as temporary, open(temporary, "wb") as opened:
            np.savez_compressed(opened, **arrays)  # type: ignore[arg-type] # NumPy's flag is no array's name


class Batches(Protocol):
    """Batches of (uint8 [b, C, H, W], int64 [b] or float32 [b, classes]), whose number is known."""

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
    forward = Forward(model, normalise, precision, cuda_graph and device.type == "cuda" and len(batches) > 2)
    labels, losses = [], []
    tops: list[tuple[Tensor, Tensor]] = []
    total, done = len(batches), 0
    started = time.monotonic()
    with frozen_casts(model, compute_dtype(precision)):
        for number, (images, targets) in enumerate(_pinned(batches, device), start=1):
            logits = forward(images.to(device, non_blocking=True))
            losses.append(summed_loss(logits, targets.to(device, non_blocking=True)).double())
            tops.append(most_probable(logits, targets.ndim == 2))
            labels.append(targets)
            done += len(targets)
            if number > 1:
                tops[-2] = _on_host(tops[-2])  # waits for the batch before, so that the host is one batch ahead
            console.live(_live_line(number, total, done, time.monotonic() - started))
    console.clear()
    classes, probabilities = (torch.cat(parts) for parts in zip(*map(_on_host, tops), strict=True))
    truth = torch.cat([target.cpu() for target in labels])
    return Predictions(
        predicted=classes[:, 0].clone(),
        labels=truth,
        classes=classes,
        probabilities=probabilities,
        loss=torch.stack(losses).sum().item() / done,
        seconds=time.monotonic() - started,
        average_precision=None if truth.ndim == 1 else _average_precision(classes, probabilities, truth),
    )


def most_probable(logits: Tensor, several: bool, top: int = TOP) -> tuple[Tensor, Tensor]:
    """The most probable classes and their probabilities, [b, k] each; all classes where images have several labels."""
    probabilities = probabilities_of(logits, several)
    best = logits.argsort(dim=1, descending=True, stable=True)  # the first class of several with equal logits
    best = best if several else best[:, :top]
    return best, probabilities.gather(1, best)


def _on_host(top: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return top[0].cpu(), top[1].cpu()


def _average_precision(classes: Tensor, probabilities: Tensor, labels: Tensor) -> float:
    scores = torch.zeros(labels.shape).scatter_(1, classes, probabilities)
    return mean_average_precision(scores, labels)


class Forward:
    """From uint8 images [b, C, H, W] to float32 logits [b, classes].

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


def _pinned(batches: Batches, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; for a GPU in memory that it can read, into which a thread copies them `AHEAD` batches early.

    The images lie in a mapped file, so that a copy waits for the system, and often for the disk.
    """
    if device.type != "cuda":
        yield from batches
        return

    def pin(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.cuda.device(device):
            images, targets = (tensor if tensor.is_cuda else tensor.pin_memory() for tensor in batch)
        return images, targets

    waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for batch in batches:
            waiting.append(thread.submit(pin, batch))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _live_line(batch: int, batches: int, images: int, seconds: float) -> str:
    left = Progress(batch, batches, seconds).eta_seconds or 0.0
    return f"test batch {batch}/{batches}  {images / max(seconds, 1e-9):,.0f} images/s  {format_duration(left)} left"
