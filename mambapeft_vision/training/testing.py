"""Testing a model on a split: predictions, accuracy, loss, speed."""

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.atomic import atomic_path
from mambapeft_vision.data.progress import Progress, format_duration
from mambapeft_vision.training.console import Console

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


def apply_precision(precision: str) -> None:
    """Sets PyTorch's process-wide switches for float32 products on GPUs: full precision, or tf32."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


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
) -> Predictions:
    """Runs `model` in evaluation mode over batches of (uint8 [b, 3, H, W], int64 [b])."""
    model.eval().to(device)
    normalise.to(device)
    predicted, labels, losses = [], [], []
    total = len(batches)
    started = time.monotonic()
    for number, (images, targets) in enumerate(batches, start=1):
        with autocast(precision, device):
            logits = model(normalise(images.to(device))).float()
        losses.append(F.cross_entropy(logits, targets.to(device), reduction="sum").double())
        predicted.append(logits.argmax(dim=1).cpu())
        labels.append(targets.cpu())
        console.live(_live_line(number, total, sum(map(len, labels)), time.monotonic() - started))
    console.clear()
    count = sum(map(len, labels))
    return Predictions(
        predicted=torch.cat(predicted),
        labels=torch.cat(labels),
        loss=torch.stack(losses).sum().item() / count,
        seconds=time.monotonic() - started,
    )


def _live_line(batch: int, batches: int, images: int, seconds: float) -> str:
    left = Progress(batch, batches, seconds).eta_seconds or 0.0
    return f"test batch {batch}/{batches}  {images / max(seconds, 1e-9):,.0f} images/s  {format_duration(left)} left"
