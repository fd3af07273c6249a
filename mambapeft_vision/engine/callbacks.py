"""The callbacks around the training steps: history, progress, the stop at a non-finite loss, checkpoints.

`callbacks_of_a_run` has them in their order.
"""

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mambapeft_vision.engine.checkpoint import INPUTS
from mambapeft_vision.engine.module import FineTuning, TrainingModule
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.errors import NotFiniteError, Preempted, UserError
from mambapeft_vision.utils.progress import format_duration
from mambapeft_vision.utils.timeline import mark

Row = dict[str, float]


def callbacks_of_a_run(
    *,
    task: str,
    methods: str,
    checkpoint: Path,
    checkpoint_every_s: float,
    inputs: Mapping[str, str | None],
    ends_sweep: bool,
    history: "History",
    console: Console,
) -> list[Callback]:
    """The callbacks of a fine-tuning run, which Lightning calls in this order.

    * StopAtNonFinite comes first: what follows must not count, show or save an epoch whose weights are not finite.
    * History makes the epoch's row before ProgressLine shows it.
    * WarmupPhases changes what is trained before Checkpoints saves it.
    * Checkpoints comes before StopAtSigterm, which saves once more only where Checkpoints did not, and then leaves.

    Args:
        task, methods: for messages.
        inputs: fingerprints of what the run is made from, for its checkpoints.
        ends_sweep: whether a sweep ends with a run that is not finite.
    """
    return [
        StopAtNonFinite(task, methods, checkpoint, ends_sweep),
        history,
        ProgressLine(console, history),
        WarmupPhases(console),
        checkpoints := Checkpoints(checkpoint, checkpoint_every_s, inputs),
        StopAtSigterm(checkpoints),
    ]


class History(Callback):
    """One row an epoch, in metrics.csv and to `log`.

    The rows are part of the checkpoint, and the file is rewritten whole: after a resume it has every epoch once.

    Args:
        file: metrics.csv.
        log: called with each new row.
    """

    def __init__(self, file: Path, log: Callable[[Row], None]) -> None:
        self.rows: list[Row] = []
        self._file = file
        self._log = log
        self._started = 0.0
        self.seconds_before = 0.0  # spent in epochs before an interruption

    @property
    def seconds(self) -> float:
        """Time spent in all training epochs."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def images_per_second(self) -> float:
        """Over all epochs; 0.0 when there were none."""
        return sum(row["images_per_second"] * row["seconds"] for row in self.rows) / self.seconds if self.rows else 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and not self.rows:
            mark("first step")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _fine_tuning(pl_module)
        loss_sum, correct, _ = module.step.take_totals()  # waits for the device
        seconds, images = time.monotonic() - self._started, module.images_seen
        if not self.rows:
            mark("first epoch")
        row = {
            "epoch": trainer.current_epoch,
            "step": module.steps_done,
            "loss": loss_sum / images,
            "accuracy": correct / images,
            "lr": max(float(group["lr"]) for group in trainer.optimizers[0].param_groups),
            "images_per_second": images / seconds,
            "seconds": seconds,
        }
        self.rows.append(row)
        write_text(self._file, _csv(self.rows))
        self._log(row)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self.seconds_before = self.seconds
        write_text(self._file, _csv(self.rows))


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class ProgressLine(Callback):
    """Where the run is, images/s and time left: live on a terminal, and a line an epoch in the log."""

    INTERVAL_S = 0.2  # between two rewritings of the live line

    def __init__(self, console: Console, history: History) -> None:
        self._console = console
        self._history = history
        self._epoch_started = 0.0
        self._shown = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self._shown < self.INTERVAL_S:
            return
        self._shown = now
        module = _fine_tuning(pl_module)
        epochs, epoch = module.recipe.max_epochs, trainer.current_epoch
        seconds, steps, done = now - self._epoch_started, module.steps_per_epoch, batch_idx + 1
        steps_left = (epochs - epoch) * steps - done
        self._console.live(
            f"epoch {epoch + 1}/{epochs}  step {done}/{steps}  {module.images_seen / seconds:,.0f} images/s  "
            f"{format_duration(steps_left * seconds / done)} left"
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row, epochs = self._history.rows[-1], _fine_tuning(pl_module).recipe.max_epochs
        epochs_left = epochs - row["epoch"] - 1
        self._console.note(
            f"epoch {row['epoch'] + 1}/{epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.1%}  "
            f"{row['images_per_second']:,.0f} images/s  {format_duration(epochs_left * row['seconds'])} left"
        )


class StopAtNonFinite(Callback):
    """Ends the run after a step whose loss or gradient was not finite. Such a step changes no weight (see `TrainStep`).

    The device is asked without waiting for it, so steps after the bad one may have been launched: they change nothing.
    Before a checkpoint is saved, trained weights are checked too: a finite gradient can still overflow them.

    Args:
        task, methods: for the message.
        checkpoint: the run's checkpoint file, for the message.
        ends_sweep: whether the error also ends the sweep that the run is part of.
    """

    def __init__(self, task: str, methods: str, checkpoint: Path, ends_sweep: bool) -> None:
        self._task, self._methods, self._checkpoint = task, methods, checkpoint
        self._ends_sweep = ends_sweep

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _fine_tuning(pl_module)
        last = batch_idx + 1 == module.steps_per_epoch
        # The end of a warm-up brings a new step, which knows nothing of the old one's failure.
        warming_up = any(method.warming_up for method in module.model.methods.values())
        if module.step.failed(wait=last and warming_up):
            self._stop(module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _fine_tuning(pl_module)
        finite = _finite_weights(module)  # launched behind the last steps, before anything waits for them
        if module.step.failed(wait=True):
            self._stop(module)
        wrong = [name for name, good in zip(module.model.trained(), finite.tolist()) if not good]
        if wrong:
            raise self._error(f"weights are not finite ({wrong[0]})", module.steps_done - 1, module)

    def _stop(self, module: FineTuning) -> None:
        _, _, number = module.step.take_totals()  # good steps of this epoch: the number of the bad one
        batch = module.whole_batch(number)
        loss = module.gradients(batch, number)
        _, norm = largest_gradient(module)
        weights = not_finite_weights(module)
        what = f"the loss is {loss}"
        if not torch.isfinite(module.normalise(batch[0])).all():
            what = f"the input is not finite, and so the loss is {loss}"
        elif weights:
            what = f"weights are not finite ({weights[0]}) and the loss is {loss}"
        elif math.isfinite(loss) and math.isfinite(norm):
            what = f"a loss or gradient was not finite, but computed again it is (a fault of the machine?): loss {loss}"
        elif math.isfinite(loss):
            what = f"the gradient is not finite (the loss is {loss})"
        raise self._error(what, module.current_epoch * module.steps_per_epoch + number, module)

    def _error(self, what: str, step: int, module: FineTuning) -> NotFiniteError:
        place, norm = largest_gradient(module)
        kept = f"{self._checkpoint} is the last good state" if self._checkpoint.exists() else "no checkpoint was made"
        return NotFiniteError(
            f"{what} in step {step} (epoch {module.current_epoch + 1}) of {self._methods} on {self._task}; largest "
            f"gradient norm: {norm:.3g} in {place}. Training stopped and {kept}; lower trainer.learning_rate or the "
            f"method's scale, or set trainer.precision=fp32",
            self._ends_sweep,
        )


def not_finite_weights(module: FineTuning) -> list[str]:
    """Names of the trained tensors that hold NaN or infinity; waits for the device."""
    return [name for name, good in zip(module.model.trained(), _finite_weights(module).tolist()) if not good]


def _finite_weights(module: FineTuning) -> Tensor:
    """Whether each trained tensor is finite; does not wait for the device."""
    largest = torch._foreach_norm(list(module.model.trained().values()), math.inf)  # few launches, and NaN stays NaN
    return torch.isfinite(torch.stack(largest))


def largest_gradient(module: FineTuning) -> tuple[str, float]:
    """The part of the model with the largest gradient norm, and the norm; NaN counts as largest."""
    squares: dict[str, float] = {}
    for name, parameter in module.model.trained().items():
        if parameter.grad is not None:
            part = name.rpartition(".")[0]
            squares[part] = squares.get(part, 0.0) + parameter.grad.double().square().sum().item()
    part = max(squares, key=lambda name: math.inf if math.isnan(squares[name]) else squares[name])
    return part, math.sqrt(squares[part])


class WarmupPhases(Callback):
    """Ends the warm-up phase of methods that have one, and gives the tensors owned from then on a new optimiser."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _fine_tuning(pl_module)
        steps = module.recipe.max_epochs * module.steps_per_epoch
        for name, method in module.model.methods.items():
            if method.warming_up and method.warmup_steps >= steps:
                raise UserError(
                    f"method.{name} warms up for {method.warmup_steps} steps, but the run has {steps}; expected fewer: "
                    f"lower it, or raise trainer.max_epochs"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _fine_tuning(pl_module)
        methods = module.model.methods.values()
        due = [method for method in methods if method.warming_up and module.steps_done >= method.warmup_steps]
        for method in due:
            self._console.note(f"{method.name}: {method.finish_warmup()}")
        if due:
            module.restart_optimizer()


class Checkpoints(Callback):
    """Saves the run's state at ends of epochs, at most every `every_s` seconds, and at the last one.

    Args:
        inputs: fingerprints of what the run is made from; they are saved with its state.
    """

    def __init__(self, file: Path, every_s: float, inputs: Mapping[str, str | None] | None = None) -> None:
        self._inputs = dict(inputs or {})
        self._file = file
        self._every_s = every_s
        self._saved = time.monotonic()
        self._saved_epoch: int | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        due = last or time.monotonic() - self._saved >= self._every_s
        if due and _training(pl_module).can_be_saved:
            self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[INPUTS] = self._inputs

    def save(self, trainer: Trainer) -> None:
        """Saves the end of this epoch, unless it is saved."""
        if self._saved_epoch != trainer.current_epoch:
            trainer.save_checkpoint(self._file)
            self._saved, self._saved_epoch = time.monotonic(), trainer.current_epoch


class StopAtSigterm(Callback):
    """On SIGTERM (Slurm's preemption) the current epoch becomes the last one: its end is saved and the process exits.

    This holds during training only. At other times SIGTERM ends the process as usual, and finished work is kept.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In place of Lightning's, which leaves without saving; its teardown restores what was there before.
        if threading.current_thread() is threading.main_thread():  # others get no signals
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self._asked = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _training(pl_module)
        if self._asked and module.can_be_saved:
            self._checkpoints.save(trainer)
            raise Preempted(f"terminated after {module.position}, which is saved")


def _training(module: LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module


def _fine_tuning(module: LightningModule) -> FineTuning:
    assert isinstance(module, FineTuning)
    return module
