"""The `trainer` section of a run's config: the recipe and how it is run.

Light to import, as mambapeft_vision/run/config.py is.
"""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from mambapeft_vision.utils.errors import UserError

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
STOP, SKIP_RUN = ON_NONFINITE = ("stop", "skip_run")


@dataclass
class TrainerConfig:
    """The recipe and how it is run.

    Args:
        max_epochs: passes over the training images.
        learning_rate: AdamW's, at the end of the warm-up.
        min_lr: where the cosine ends; absolute, for every parameter group.
        weight_decay: AdamW's, decoupled.
        betas: AdamW's two decay rates of moments.
        eps: AdamW's term in the denominator.
        warmup_epochs: epochs of linear warm-up, a little each step; a cosine that falls once an epoch follows.
        start_factor: share of the learning rate in the very first step.
        clip_norm: largest global norm of the gradient; null clips nothing.
        head_lr_mult: multiplies the head's learning rate.
        head_decay_mult: multiplies the head's weight decay.
        precision: auto (bf16 on a GPU, fp32 on a CPU), bf16 (mixed), tf32 or fp32.
        micro_batch: images in a pass, whose gradients add up to the batch's; null takes the batch in one pass.
        cuda_graph: capture the training step on a GPU and replay it; false launches kernel by kernel.
        device: auto, cpu, cuda or cuda:N.
        devices: GPUs of one run, which share each batch.
        checkpoint_every_s: seconds between checkpoints, at ends of epochs; 0 writes one after every epoch.
        picture: draw learning curves, a confusion matrix and some test images.
        on_nonfinite: stop or skip_run: whether a run that meets NaN or infinity ends its sweep too.
    """

    max_epochs: int = MISSING
    learning_rate: float = MISSING
    min_lr: float = MISSING
    weight_decay: float = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    warmup_epochs: int = MISSING
    start_factor: float = MISSING
    clip_norm: float | None = MISSING
    head_lr_mult: float = MISSING
    head_decay_mult: float = MISSING
    precision: str = MISSING
    micro_batch: int | None = MISSING
    cuda_graph: bool = MISSING
    device: str = MISSING
    devices: int = MISSING
    checkpoint_every_s: float = MISSING
    picture: bool = MISSING
    on_nonfinite: str = STOP  # runs recorded before there was this key lack it

    def check(self) -> None:
        """Raises UserError for values outside their range."""
        _require(self.max_epochs >= 1, "max_epochs", self.max_epochs, "at least 1")
        warm_up = f"0 to max_epochs={self.max_epochs}; set warmup_epochs too"
        _require(0 <= self.warmup_epochs <= self.max_epochs, "warmup_epochs", self.warmup_epochs, warm_up)
        for key in ("learning_rate", "min_lr", "weight_decay", "head_lr_mult", "head_decay_mult", "checkpoint_every_s"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "at least 0")
        _require(self.eps > 0, "eps", self.eps, "above 0")
        _require(0 <= self.start_factor <= 1, "start_factor", self.start_factor, "0 to 1")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            list(self.betas),
            "two numbers of at least 0 and below 1",
        )
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0, or null")
        micro = self.micro_batch
        _require(micro is None or micro >= 1, "micro_batch", micro, "at least 1, or null")
        _require(self.devices >= 1, "devices", self.devices, "at least 1")
        wanted = f"one of {', '.join(ON_NONFINITE)}"
        _require(self.on_nonfinite in ON_NONFINITE, "on_nonfinite", self.on_nonfinite, wanted)
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")


def _require(valid: bool, key: str, value: Any, expected: str) -> None:
    if not valid:
        raise UserError(f"trainer.{key}={value}; expected {expected}")
