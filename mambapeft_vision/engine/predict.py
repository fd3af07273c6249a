"""Testing a model on a split: predictions, accuracy, loss, speed."""

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import frozen_casts
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


def resolve_precision(precision: str, device: torch.device) -> str:
    """auto → bf16 on a GPU, fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For the time of a recording: freeing what an earlier run left on the device would break it off."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def after_failed_recording(device: torch.device) -> None:
    """Makes a device fit for launches again: its random generator still waits for the end of the recording."""
    torch.cuda.synchronize(device)
    torch.cuda.default_generators[device.index].graphsafe_set_state(torch.Generator(device))


def apply_precision(precision: str) -> None:
    """Sets PyTorch's process-wide switches for float32 products on GPUs: full precision, or tf32."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def compute_dtype(precision: str) -> torch.dtype | None:
    """The dtype that `autocast` computes in; None: that of the weights."""
    return torch.bfloat16 if precision == "bf16" else None


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def predict(
    model: nn.Module,
    normalise: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: str,
    device: torch.device,
    console: Console,
    record: bool = True,
) -> Predictions:
    """Runs `model` in evaluation mode over batches of (uint8 [b, 3, H, W], int64 [b]).

    Args:
        record: on a GPU, record the forward pass of a whole batch as a CUDA graph and replay it.
    """
    model.eval().to(device)
    normalise.to(device)
    forward = _Forward(model, normalise, precision, record and device.type == "cuda" and len(batches) > 2)
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

    Recorded at the first batch's size; smaller batches fill a part of it (no image's result depends on the others).
    """

    def __init__(self, model: nn.Module, normalise: nn.Module, precision: str, record: bool) -> None:
        self._model, self._normalise, self._precision = model, normalise, precision
        self._record = record
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self._record:
            logits = self._run(images)  # also brings everything up that a recording must not wait for
            self._record = False
            self._start_recording(images)
            return logits
        if self._graph is None:
            return self._run(images)
        self._images[: len(images)].copy_(images)
        self._graph.replay()
        return self._logits[: len(images)].clone()

    def _run(self, images: Tensor) -> Tensor:
        with autocast(self._precision, images.device):
            return self._model(self._normalise(images)).float()

    def _start_recording(self, images: Tensor) -> None:
        self._images, graph = images.clone(), torch.cuda.CUDAGraph()
        try:
            with no_garbage_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._run(self._images)
        except RuntimeError:  # a model that cannot be recorded is launched kernel by kernel, as in training
            after_failed_recording(images.device)
            return
        self._graph = graph


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`; from the host without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _live_line(batch: int, batches: int, images: int, seconds: float) -> str:
    left = Progress(batch, batches, seconds).eta_seconds or 0.0
    return f"test batch {batch}/{batches}  {images / max(seconds, 1e-9):,.0f} images/s  {format_duration(left)} left"
