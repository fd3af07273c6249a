"""What happens around the training steps: history, progress, the stop at a non-finite loss, checkpoints."""

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from mambapeft_vision.engine.module import FineTuning
from mambapeft_vision.engine.schedule import make_optimizer
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.errors import NotFiniteError, Preempted, UserError
from mambapeft_vision.utils.progress import format_duration

Row = dict[str, float]


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

    def on_train_epoch_start(self, trainer: Trainer, pl_module: FineTuning) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: FineTuning) -> None:
        loss_sum, correct, _ = pl_module.step.take_totals()  # waits for the device
        seconds, images = time.monotonic() - self._started, pl_module.images_seen
        row = {
            "epoch": trainer.current_epoch,
            "step": pl_module.steps_done,
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

    def on_train_epoch_start(self, trainer: Trainer, pl_module: FineTuning) -> None:
        self._epoch_started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: FineTuning, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self._shown < self.INTERVAL_S:
            return
        self._shown = now
        seconds, steps, done = now - self._epoch_started, trainer.num_training_batches, batch_idx + 1
        steps_left = (trainer.max_epochs - trainer.current_epoch) * steps - done
        self._console.live(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {done}/{steps}  "
            f"{pl_module.images_seen / seconds:,.0f} images/s  {format_duration(steps_left * seconds / done)} left"
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: FineTuning) -> None:
        row = self._history.rows[-1]
        epochs_left = trainer.max_epochs - row["epoch"] - 1
        self._console.note(
            f"epoch {row['epoch'] + 1}/{trainer.max_epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.1%}  "
            f"{row['images_per_second']:,.0f} images/s  {format_duration(epochs_left * row['seconds'])} left"
        )


class StopAtNonFinite(Callback):
    """Ends the run after a step whose loss or gradient was not finite. Such a step changes no weight (see `TrainStep`).

    The device is asked without waiting for it, so steps after the bad one may have been launched: they change nothing.
    Weights, which a last finite gradient can have thrown out of range, are looked at before an epoch's end is saved.

    Args:
        task, methods: for the message.
        checkpoint: the run's checkpoint file, for the message.
        ends_sweep: of the error.
    """

    def __init__(self, task: str, methods: str, checkpoint: Path, ends_sweep: bool) -> None:
        self._task, self._methods, self._checkpoint = task, methods, checkpoint
        self._ends_sweep = ends_sweep

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: FineTuning, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = batch_idx + 1 == trainer.num_training_batches
        if pl_module.step.failed(wait=last):
            self._stop(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: FineTuning) -> None:
        wrong = not_finite_weights(pl_module)
        if wrong:
            module, norm = largest_gradient(pl_module)
            number = (trainer.current_epoch + 1) * trainer.num_training_batches - 1
            raise self._error(f"weights are not finite ({wrong[0]})", number, trainer, norm, module)

    def _stop(self, trainer: Trainer, pl_module: FineTuning) -> None:
        _, _, number = pl_module.step.take_totals()  # good steps of this epoch: the number of the bad one
        epoch, size = trainer.current_epoch, trainer.datamodule.batch_size
        chosen = trainer.datamodule.epoch_order(epoch)[number * size : (number + 1) * size]
        batch = trainer.datamodule.train_set.batch(chosen)
        loss = pl_module.gradients(batch, number)
        module, norm = largest_gradient(pl_module)
        weights = not_finite_weights(pl_module)
        what = f"the loss is {loss}"
        if not torch.isfinite(pl_module.normalise(batch[0])).all():
            what = f"the input is not finite, and so the loss is {loss}"
        elif weights:
            what = f"weights are not finite ({weights[0]}) and the loss is {loss}"
        elif math.isfinite(loss) and math.isfinite(norm):
            what = f"a loss or gradient was not finite, but computed again it is (a fault of the machine?): loss {loss}"
        elif math.isfinite(loss):
            what = f"the gradient is not finite (the loss is {loss})"
        raise self._error(what, epoch * trainer.num_training_batches + number, trainer, norm, module)

    def _error(self, what: str, step: int, trainer: Trainer, norm: float, module: str) -> NotFiniteError:
        kept = f"{self._checkpoint} is the last good state" if self._checkpoint.exists() else "no checkpoint was made"
        return NotFiniteError(
            f"{what} in step {step} (epoch {trainer.current_epoch + 1}) of {self._methods} on {self._task}; largest "
            f"gradient norm: {norm:.3g} in {module}. Training stopped and {kept}; lower trainer.learning_rate or the "
            f"method's scale, or set trainer.precision=fp32",
            self._ends_sweep,
        )


def not_finite_weights(module: FineTuning) -> list[str]:
    """Names of the trained tensors that hold NaN or infinity; waits for the device."""
    trained = module.model.trained()
    largest = torch._foreach_norm(list(trained.values()), math.inf)  # few launches, and NaN stays NaN
    finite = torch.isfinite(torch.stack(largest)).tolist()
    return [name for name, good in zip(trained, finite) if not good]


def largest_gradient(module: FineTuning) -> tuple[str, float]:
    """Name of the module (method site or head) with the largest gradient norm, and the norm; NaN counts as largest."""
    squares: dict[str, float] = {}
    for name, parameter in module.model.trained().items():
        if parameter.grad is not None:
            site = name.rpartition(".")[0]
            squares[site] = squares.get(site, 0.0) + parameter.grad.double().square().sum().item()
    site = max(squares, key=lambda name: math.inf if math.isnan(squares[name]) else squares[name])
    return site, math.sqrt(squares[site])


class WarmupPhases(Callback):
    """Ends the warm-up phase of methods that have one, and gives the tensors owned from then on a new optimiser."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_train_start(self, trainer: Trainer, pl_module: FineTuning) -> None:
        steps = trainer.max_epochs * trainer.num_training_batches
        for name, method in pl_module.model.methods.items():
            if method.warming_up and method.warmup_steps >= steps:
                raise UserError(
                    f"method.{name} warms up for {method.warmup_steps} steps, but the run has {steps}; expected fewer: "
                    f"lower it, or raise trainer.max_epochs"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: FineTuning, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        methods = pl_module.model.methods.values()
        due = [method for method in methods if method.warming_up and pl_module.steps_done >= method.warmup_steps]
        for method in due:
            self._console.note(f"{method.name}: {method.finish_warmup()}")
        if due:
            trainer.optimizers = [make_optimizer(pl_module.model, pl_module.recipe)]
            pl_module.renew_step()


class StopAtSigterm(Callback):
    """On SIGTERM (Slurm's preemption) the epoch under way is the last one: its end is saved and the process leaves.

    While training only: at other times SIGTERM ends the process as usual, and nothing is lost but what it was at.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._told = False

    def on_train_start(self, trainer: Trainer, pl_module: FineTuning) -> None:
        # In place of Lightning's, which leaves without saving; its teardown restores what was there before.
        if threading.current_thread() is threading.main_thread():  # others get no signals
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self._told = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: FineTuning) -> None:
        if self._told:
            trainer.save_checkpoint(self._checkpoint)
            epoch = trainer.current_epoch + 1
            raise Preempted(f"terminated after epoch {epoch} of {trainer.max_epochs}, which is saved")


class Checkpoints(Callback):
    """Saves the run's state at ends of epochs, at most every `every_s` seconds, and at the last one."""

    def __init__(self, file: Path, every_s: float) -> None:
        self._file = file
        self._every_s = every_s
        self._saved = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: FineTuning) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if last or time.monotonic() - self._saved >= self._every_s:
            trainer.save_checkpoint(self._file)
            self._saved = time.monotonic()
