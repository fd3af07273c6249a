"""The callbacks around the steps of pretraining: their number, reports, validation."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mambapeft_vision.engine.callbacks import Checkpoints, StopAtSigterm
from mambapeft_vision.pretraining.module import ROUND, WARM_UP, Pretraining
from mambapeft_vision.utils.errors import NotFiniteError
from mambapeft_vision.utils.progress import format_duration

TIMED = 40  # steps from which the speed is taken
TIME_MARGIN = 0.97  # share of the time left that is planned for
REPORT_S = 5.0

OnEvaluation = Callable[[dict[str, float]], object]


def callbacks_of_pretraining(checkpoint: Path, every_s: float, on_evaluation: OnEvaluation) -> list[Callback]:
    """The callbacks of a pretraining run, which Lightning calls in this order.

    * Length comes first: the others ask how many steps there are, and whether this one is the last.
    * Report looks at the loss before Checkpoints saves, so that no state after a loss that is not finite is kept.
    * Validation follows Report, whose clock and loss it restarts.
    * Checkpoints comes before StopAtSigterm, which saves once more only where Checkpoints did not, and then leaves.

    Args:
        on_evaluation: called with the accuracies.
    """
    report = Report()
    checkpoints = Checkpoints(checkpoint, every_s)
    return [Length(), report, Validation(report, on_evaluation), checkpoints, StopAtSigterm(checkpoints)]


class Length(Callback):
    """Ends the run after its steps. With `minutes` their number follows from the measured speed."""

    def __init__(self) -> None:
        self._timed_from = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = _pretraining(pl_module).is_done  # it was killed after its last step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _pretraining(pl_module)
        if module.steps_done == 2 * WARM_UP:
            module.wait()
            self._timed_from = time.monotonic()
        if module.steps_done == 2 * WARM_UP + TIMED and module.total_steps is None:
            module.wait()
            self._plan(module, (time.monotonic() - self._timed_from) / TIMED)
        if module.is_done:
            trainer.should_stop = True
        elif module.steps_done % ROUND == 0:
            module.wait()  # or the steps that wait on the device would not count
            self._stop_if_late(trainer, module)

    def _plan(self, module: Pretraining, seconds_per_step: float) -> None:
        config = module.config
        assert config.minutes is not None
        left = 60 * config.minutes - module.seconds
        module.total_steps = module.steps_done + max(1, int(TIME_MARGIN * left / seconds_per_step))
        print(
            f"{config.batch_size / seconds_per_step:,.0f} images/s: {module.total_steps:,} steps fit into "
            f"{config.minutes:g} minutes",
            flush=True,
        )

    def _stop_if_late(self, trainer: Trainer, module: Pretraining) -> None:
        minutes, total = module.config.minutes, module.total_steps
        if minutes is not None and total is not None and module.seconds > 60 * minutes:
            print(f"stopped at the time limit, {total - module.steps_done:,} steps early", flush=True)
            trainer.should_stop = True


class Report(Callback):
    """A line with loss, speed and time left, at ends of rounds at most every REPORT_S seconds, and at the last step.

    Raises: NotFiniteError for a loss that is not finite.
    """

    def __init__(self) -> None:
        self._step, self._time = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restart(_pretraining(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _pretraining(pl_module)
        if module.steps_done % ROUND and not module.is_done:
            return
        loss = module.mean_loss(module.steps_done - self._step)  # waits for the device
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss is {loss} at step {module.steps_done}; lower pretrain.learning_rate, or set "
                f"pretrain.precision=fp32"
            )
        if module.is_done or time.monotonic() - self._time >= REPORT_S:
            self._report(module, loss)
            self.restart(module)

    def restart(self, module: Pretraining) -> None:
        """Counts from here."""
        module.forget_losses()
        self._step, self._time = module.steps_done, time.monotonic()

    def _report(self, module: Pretraining, loss: float) -> None:
        step, total = module.steps_done, module.total_steps
        seconds = (time.monotonic() - self._time) / (step - self._step)
        rate = module.config.batch_size / seconds
        left = "?" if total is None else format_duration((total - step) * seconds)
        module.progress.append({"step": step, "loss": round(loss, 4), "images_per_s": round(rate)})
        print(f"step {step:,}/{total or 0:,}  loss {loss:.3f}  {rate:,.0f} images/s  {left} left", flush=True)


class Validation(Callback):
    """Validates the averaged weights a few times on the way, and at the last step."""

    def __init__(self, report: Report, on_evaluation: OnEvaluation) -> None:
        self._report = report
        self._on_evaluation = on_evaluation

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _pretraining(pl_module)
        if not _is_evaluation(module.steps_done, module.total_steps, module.config.evaluations):
            return
        accuracies = module.accuracies()
        module.progress.append({"step": module.steps_done, **{f"accuracy_{k}": v for k, v in accuracies.items()}})
        print("  " + describe_accuracies(accuracies), flush=True)
        self._on_evaluation(accuracies)
        self._report.restart(module)


def _is_evaluation(step: int, total: int | None, evaluations: int) -> bool:
    if total is None:
        return False
    every = max(1, total // evaluations)
    return step == total or (step % every == 0 and step + every // 2 < total)


def describe_accuracies(accuracies: dict[str, float]) -> str:
    """Accuracies of all sources in one line."""
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items())


def _pretraining(module: LightningModule) -> Pretraining:
    assert isinstance(module, Pretraining)
    return module
