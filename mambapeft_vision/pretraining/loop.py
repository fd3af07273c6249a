"""The training loop: mixed batches, a schedule that ends in time, progress, validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.pretraining.augment import augment
from mambapeft_vision.pretraining.config import PretrainConfig
from mambapeft_vision.pretraining.model import Average, SharedBackbone, decay_groups
from mambapeft_vision.pretraining.sources import Source
from mambapeft_vision.pretraining.teacher import Teacher
from mambapeft_vision.utils.progress import format_duration

_WARM_UP = 5  # steps before a step is recorded or timed: kernels compile, libraries load
_TIMED = 40  # steps from which the speed is taken
_CLOCK_STEPS = 20  # between looks at the clock, which wait for the device
_REPORT_SECONDS = 5.0
_TIME_MARGIN = 0.97  # of the time left is planned for


class Pretraining:
    """One run on one device. `run` trains; `accuracies` validates the averaged weights.

    sources: on the device. on_evaluation: called with the number of steps done and the accuracies so far.
    """

    def __init__(
        self,
        model: SharedBackbone,
        sources: list[Source],
        preprocessing: Preprocessing,
        config: PretrainConfig,
        teacher: Teacher | None = None,
    ) -> None:
        self.config = config
        self._teacher = teacher
        self.model = model.train()
        self.sources = {source.name: source for source in sources}
        self.device = next(model.parameters()).device
        self.sizes = batch_sizes({source.name: source.config.share for source in sources}, config.batch_size)
        self.average = Average(model, config.ema)
        self.total_steps = config.steps
        self.log: list[dict[str, Any]] = []
        self.seconds_before = 0.0  # of training, before an interruption
        self._first_step = 0
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )
        on_gpu = self.device.type == "cuda"
        # A recorded step reads its learning rate from the device.
        rate = torch.zeros((), device=self.device) if on_gpu else 0.0
        self._optimizer = torch.optim.AdamW(
            decay_groups(model, config.weight_decay), lr=rate, betas=(0.9, 0.98), fused=on_gpu, capturable=on_gpu
        )
        self._loss = torch.zeros((), device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        # A step can be recorded on a stream of its own only, and what it reads is best written there too.
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None

    # Training

    def run(
        self,
        on_evaluation: Callable[[int, dict[str, float]], None],
        on_checkpoint: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> int:
        """Trains to the end of the schedule; returns the number of steps. Validates a few times on the way.

        on_checkpoint: called every `checkpoint_every_s` seconds with a state that `restore` takes, not to be kept.
        """
        with self._own_stream():
            return self._run(on_evaluation, on_checkpoint)

    def _run(
        self,
        on_evaluation: Callable[[int, dict[str, float]], None],
        on_checkpoint: Callable[[dict[str, Any]], None],
    ) -> int:
        now = time.monotonic()
        started, step = now - self.seconds_before, self._first_step
        timed_from, report, saved = now, (step, now), now
        while self.total_steps is None or step < self.total_steps:
            self._set_learning_rate(step)
            self._advance(step)
            self.average.update()
            step += 1
            if step == 2 * _WARM_UP:
                self._wait()
                timed_from = time.monotonic()
            if step == 2 * _WARM_UP + _TIMED and self.total_steps is None:
                self._wait()
                self._plan(step, (time.monotonic() - timed_from) / _TIMED, time.monotonic() - started)
            if step % _CLOCK_STEPS == 0 or step == self.total_steps:
                self._wait()
                now = time.monotonic()
                if now - report[1] >= _REPORT_SECONDS or step == self.total_steps:
                    self._report(step, report)
                    report = (step, now)
                if self.total_steps is not None and now - saved >= self.config.checkpoint_every_s:
                    on_checkpoint(self._state(step, now - started))
                    saved = time.monotonic()
                if self._is_late(step, now - started):
                    print(f"stopped at the time limit, {self.total_steps - step:,} steps early", flush=True)
                    break
            if self._is_evaluation(step):
                accuracies = self.accuracies()
                self.log.append({"step": step, **{f"accuracy_{k}": v for k, v in accuracies.items()}})
                print("  " + describe_accuracies(accuracies), flush=True)
                on_evaluation(step, accuracies)
                report = (step, time.monotonic())
                self._loss.zero_()
        return step

    def _state(self, step: int, seconds: float) -> dict[str, Any]:
        """All that the following steps depend on."""
        on_gpu = self.device.type == "cuda"
        return {
            "step": step,
            "total_steps": self.total_steps,
            "seconds": seconds,
            "log": self.log,
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "updates": self.average.updates,
            "optimizer": self._optimizer.state_dict(),
            "random": torch.cuda.get_rng_state(self.device) if on_gpu else torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state of `run`; call it before `run`."""
        self._first_step, self.total_steps = state["step"], state["total_steps"]
        self.seconds_before, self.log = state["seconds"], state["log"]
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.average.updates = state["updates"]
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the tensor that a recorded step reads; its value is set before every step
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"].cpu(), self.device)
        else:
            torch.set_rng_state(state["random"].cpu())

    def _advance(self, step: int) -> None:
        """One step: recorded once after a warm-up and replayed from then on, where the config and device allow."""
        if self._graph is not None:
            self._graph.replay()
        elif step == self._first_step + _WARM_UP and self.config.cuda_graph and self.device.type == "cuda":
            self._wait()
            graph = torch.cuda.CUDAGraph()
            self._optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, stream=self._stream):
                self._step()
            self._graph = graph
            graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        """Draws a batch, augments it, and takes one optimiser step. Nothing here waits for the device."""
        self._optimizer.zero_grad(set_to_none=True)
        images, labels = self._draw()
        with self._autocast():
            features = self.model.backbone(images)
            logits = self.model.classify(features, self.sizes)
            distance = self._teacher.loss(self.model.projection(features), images) if self._teacher else 0.0
        loss = sum(
            F.cross_entropy(logits[name].float(), labels[name], label_smoothing=self.config.label_smoothing)
            * (size / self.config.batch_size)
            for name, size in self.sizes.items()
        )
        if self._teacher is not None:
            loss = loss + self._teacher.weight * distance
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._optimizer.step()
        self._loss += loss.detach()

    def _draw(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised images [batch, 3, H, W], source after source, and the labels of each source."""
        images, labels = [], {}
        for name, size in self.sizes.items():
            source = self.sources[name]
            chosen = source.train[torch.randint(len(source.train), (size,), device=self.device)]
            images.append(augment(source.images[chosen].float() / 255, source.config, self.config.augment))
            labels[name] = source.labels[chosen]
        return (torch.cat(images) - self._mean) / self._std, labels

    def _set_learning_rate(self, step: int) -> None:
        rate = learning_rate(self.config, step, self.total_steps)
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _plan(self, step: int, seconds_per_step: float, elapsed: float) -> None:
        left = 60 * self.config.minutes - elapsed
        self.total_steps = step + max(1, int(_TIME_MARGIN * left / seconds_per_step))
        print(
            f"{self.config.batch_size / seconds_per_step:,.0f} images/s: {self.total_steps:,} steps fit into "
            f"{self.config.minutes:g} minutes",
            flush=True,
        )

    def _report(self, step: int, since: tuple[int, float]) -> None:
        steps = step - since[0]
        loss = float(self._loss) / steps
        self._loss.zero_()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {step}: lower learning_rate, or take precision=fp32")
        seconds = (time.monotonic() - since[1]) / steps
        rate = self.config.batch_size / seconds
        left = "?" if self.total_steps is None else format_duration((self.total_steps - step) * seconds)
        self.log.append({"step": step, "loss": round(loss, 4), "images_per_s": round(rate)})
        print(
            f"step {step:,}/{self.total_steps or 0:,}  loss {loss:.3f}  {rate:,.0f} images/s  {left} left", flush=True
        )

    def _is_evaluation(self, step: int) -> bool:
        if self.total_steps is None:
            return False
        every = max(1, self.total_steps // self.config.evaluations)
        return step == self.total_steps or (step % every == 0 and step + every // 2 < self.total_steps)

    def _is_late(self, step: int, elapsed: float) -> bool:
        limited = self.config.minutes is not None and self.total_steps is not None
        return limited and step < self.total_steps and elapsed > 60 * self.config.minutes

    def _own_stream(self) -> AbstractContextManager:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    # Validation

    @torch.no_grad()
    def accuracies(self) -> dict[str, float]:
        """Top-1 accuracy (0 to 1) of the averaged weights on each source's held-out images."""
        return {name: self._accuracy(source) for name, source in self.sources.items()}

    def _accuracy(self, source: Source) -> float:
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for chunk in source.held_out.split(512):
            images = (source.images[chunk].float() / 255 - self._mean) / self._std
            with self._autocast():
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


def learning_rate(config: PretrainConfig, step: int, total: int | None) -> float:
    """Linear warm-up, then a cosine to min_lr. While `total` is not known yet, only the warm-up."""
    peak = config.learning_rate
    if step < config.warmup_steps or total is None:
        return peak * min(1.0, (step + 1) / config.warmup_steps)
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def describe_accuracies(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items())
