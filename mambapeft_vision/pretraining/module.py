"""Pretraining as a LightningModule: a step draws its own batch on the device, from several sources.

An epoch of the trainer is a round of `ROUND` steps, after which the host looks at the clock.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.engine.cuda_graph import GraphedStep, fit_to_device
from mambapeft_vision.engine.module import TrainingModule
from mambapeft_vision.engine.precision import autocast
from mambapeft_vision.engine.schedule import cosine, warm_up, write_rates
from mambapeft_vision.pretraining.augment import augment
from mambapeft_vision.pretraining.config import PretrainConfig
from mambapeft_vision.pretraining.model import Average, SharedBackbone, decay_groups
from mambapeft_vision.pretraining.sources import Source
from mambapeft_vision.pretraining.teacher import Teacher

WARM_UP = 5  # steps before a step is captured: kernels compile, libraries load
ROUND = 20  # steps between looks at the clock, which wait for the device
STATE = "pretraining"  # key of what a checkpoint holds beside Lightning's own
BETAS = (0.9, 0.98)


class Rounds:
    """The trainer's loader: a round of steps, each of which draws its own batch."""

    def __len__(self) -> int:
        return ROUND

    def __iter__(self) -> Iterator[int]:
        return iter(range(ROUND))


class Pretraining(TrainingModule):
    """One backbone with a head for each source, and the running average of its weights.

    Args:
        model: on the device.
        sources: on the device.
        identity: identity of the run, kept in its checkpoints.
        facts: further entries for the run's record.
        note: called with one line when steps cannot be captured.
    """

    def __init__(
        self,
        model: SharedBackbone,
        sources: list[Source],
        preprocessing: Preprocessing,
        config: PretrainConfig,
        teacher: Teacher | None = None,
        *,
        identity: str = "",
        facts: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = preprocessing
        self.facts = facts or {}
        self.model = model.train()
        self.sources = {source.name: source for source in sources}
        self.sizes = batch_sizes({source.name: source.config.share for source in sources}, config.batch_size)
        self.average = Average(model, config.ema)
        self.total_steps = config.steps
        self.progress: list[dict[str, Any]] = []  # losses and accuracies on the way
        self.seconds_before = 0.0  # seconds of training before an interruption
        self.identity = identity
        self._teacher = (teacher,)  # in a tuple, so that it is no part of this module: checkpoints need no teacher
        self.place = next(model.parameters()).device
        self._mean, self._std = (
            torch.tensor(values, device=self.place).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )
        self._loss = torch.zeros((), device=self.place)
        self._started = time.monotonic()
        self._random: Tensor | None = None
        self._note = note
        self._graphed: GraphedStep | None = None

    # For callbacks

    @property
    def position(self) -> str:
        return f"step {self.steps_done:,} of {self.total_steps:,}"

    @property
    def can_be_saved(self) -> bool:
        return self.total_steps is not None

    @property
    def is_done(self) -> bool:
        return self.total_steps is not None and self.steps_done >= self.total_steps

    @property
    def seconds(self) -> float:
        """Seconds of training, including those before interruptions."""
        return time.monotonic() - self._started

    def mean_loss(self, steps: int) -> float:
        """Mean of the losses since `forget_losses`, `steps` of them; waits for the device."""
        return float(self._loss) / steps

    def forget_losses(self) -> None:
        self._loss.zero_()

    def wait(self) -> None:
        """Waits for the device."""
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)

    # Lightning's hooks

    def configure_optimizers(self) -> Optimizer:
        groups = decay_groups(self.model, self.config.weight_decay)
        groups = [{**group, "base_lr": self.config.learning_rate} for group in groups]
        return AdamW(groups, betas=BETAS, fused=self.place.type == "cuda")

    def on_train_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        fit_to_device(optimizer, self.place)
        self._graphed = GraphedStep(
            self._step,
            lambda: optimizer.zero_grad(set_to_none=True),
            self.place,
            enabled=self.config.cuda_graph,
            warm_up=WARM_UP,
            note=self._note,
        )
        self._started = time.monotonic() - self.seconds_before
        if self._random is not None:
            self._set_random_state(self._random)

    def training_step(self, batch: int, batch_idx: int) -> None:
        assert self._graphed is not None
        write_rates(
            self.trainer.optimizers[0],
            lambda base_lr: learning_rate(base_lr, self.config, self.steps_done, self.total_steps),
        )
        self._graphed()
        self.average.update()
        self.steps_done += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        on_gpu = self.place.type == "cuda"
        checkpoint[STATE] = {
            "identity": self.identity,
            "step": self.steps_done,
            "total_steps": self.total_steps,
            "seconds": self.seconds,
            "progress": self.progress,
            "average": self.average.model.state_dict(),
            "updates": self.average.updates,
            "random": torch.cuda.get_rng_state(self.place) if on_gpu else torch.get_rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint[STATE]
        self.steps_done, self.total_steps = state["step"], state["total_steps"]
        self.seconds_before, self.progress = state["seconds"], state["progress"]
        self.average.model.load_state_dict(state["average"])
        self.average.updates = state["updates"]
        self._random = state["random"].cpu()  # nothing may be drawn between setting it and the next step

    def release(self) -> None:
        if self._graphed is not None:
            self._graphed.release()

    # One step

    def _step(self) -> None:
        """Draws a batch, augments it, and takes one optimiser step. Nothing here waits for the device."""
        optimizer, (teacher,) = self.trainer.optimizers[0], self._teacher
        optimizer.zero_grad(set_to_none=True)
        images, labels = self._draw()
        with autocast(self.config.precision, self.place):
            features = self.model.features(images)
            logits = self.model.classify(features, self.sizes)
            if teacher is not None:
                distance = teacher.loss(self.model.project(features), images)
        losses = [
            F.cross_entropy(logits[name].float(), labels[name], label_smoothing=self.config.label_smoothing)
            * (size / self.config.batch_size)
            for name, size in self.sizes.items()
        ]
        loss = sum(losses[1:], losses[0])
        if teacher is not None:
            loss = loss + teacher.weight * distance
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        optimizer.step()
        self._loss += loss.detach()

    def _draw(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised images [batch, 3, H, W], source after source, and the labels of each source."""
        images, labels = [], {}
        for name, size in self.sizes.items():
            source = self.sources[name]
            chosen = source.train[torch.randint(len(source.train), (size,), device=self.place)]
            images.append(augment(source.images[chosen].float() / 255, source.config, self.config.augment))
            labels[name] = source.labels[chosen]
        return (torch.cat(images) - self._mean) / self._std, labels

    def _set_random_state(self, state: Tensor) -> None:
        if self.place.type == "cuda":
            torch.cuda.set_rng_state(state, self.place)
        else:
            torch.set_rng_state(state)

    # Validation

    @torch.no_grad()
    def accuracies(self) -> dict[str, float]:
        """Top-1 accuracy (0 to 1) of the averaged weights on each source's held-out images."""
        return {name: self._accuracy(source) for name, source in self.sources.items()}

    def _accuracy(self, source: Source) -> float:
        correct = torch.zeros((), dtype=torch.int64, device=self.place)
        for chunk in source.held_out.split(512):
            images = (source.images[chunk].float() / 255 - self._mean) / self._std
            with autocast(self.config.precision, self.place):
                logits = self.average.model(images, {source.name: len(chunk)})[source.name]
            correct += (logits.argmax(1) == source.labels[chunk]).sum()
        return int(correct) / len(source.held_out)


def batch_sizes(shares: dict[str, float], batch: int) -> dict[str, int]:
    """Images of each source in a batch: in proportion to the shares, at least one, adding up to `batch`."""
    total = sum(shares.values())
    sizes = {name: max(1, math.floor(batch * share / total)) for name, share in shares.items()}
    largest = max(sizes, key=sizes.__getitem__)
    sizes[largest] += batch - sum(sizes.values())
    return sizes


def learning_rate(base_lr: float, config: PretrainConfig, step: int, total: int | None) -> float:
    """The learning rate of one step, counted from 0: linear warm-up, then a cosine to min_lr that moves every step.

    Args:
        total: steps of the run; None while that is not known: only the warm-up.
    """
    if step < config.warmup_steps or total is None:
        return warm_up(base_lr, min(1.0, (step + 1) / config.warmup_steps))
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return cosine(base_lr, config.min_lr, math.pi * min(1.0, done))
