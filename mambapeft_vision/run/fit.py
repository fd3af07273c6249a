"""Training of an assembled run, on one device or several."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from lightning.pytorch import Callback

from mambapeft_vision.engine.callbacks import History, Row, WarmupPhases, callbacks_of_a_run
from mambapeft_vision.engine.config import STOP
from mambapeft_vision.engine.distributed import other_ranks
from mambapeft_vision.engine.loop import make_trainer, step_settings, train
from mambapeft_vision.engine.module import FineTuning
from mambapeft_vision.results.layout import CHECKPOINT_FILE, METRICS_FILE
from mambapeft_vision.run.assemble import Setup, assemble
from mambapeft_vision.run.inputs import Fingerprints
from mambapeft_vision.run.own_code import OwnCode
from mambapeft_vision.run.resume import settle_checkpoint
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.errors import UserError


def fit(
    plan: RunPlan,
    setup: Setup,
    console: Console,
    log_epoch: Callable[[Row], None],
    callbacks: Sequence[Callback] = (),
) -> History:
    """Trains to the last epoch, from the run's checkpoint where there is one, and returns the history.

    Args:
        log_epoch: called with each new row of the history.
        callbacks: more of them, called after the run's own.

    Raises: NotFiniteError at NaN or infinity.
    """
    checkpoint = plan.folder / CHECKPOINT_FILE
    task, weights = setup.task, setup.model.backbone_sha256
    inputs = Fingerprints.of_plan(plan, task.manifest_hash, weights, task.content_hash)
    history = History(plan.folder / METRICS_FILE, log_epoch)
    own = callbacks_of_a_run(
        task=plan.task,
        methods=plan.method_names,
        checkpoint=checkpoint,
        checkpoint_every_s=plan.recipe.checkpoint_every_s,
        inputs=asdict(inputs),
        ends_sweep=plan.recipe.on_nonfinite == STOP,
        history=history,
        console=console,
    )
    settle_checkpoint(plan.folder, inputs, console.say)
    if checkpoint.is_file():
        console.say(f"continues from {checkpoint}")
    devices = plan.recipe.devices
    phased = [name for name, method in setup.model.methods.items() if method.warming_up]
    if devices > 1 and phased:
        raise UserError(f"trainer.devices={devices}: {phased[0]} chooses what to train on one device; set it to 1")
    with other_ranks(devices, partial(fit_rank, plan)):
        fit_here(plan, setup, console, [*own, *callbacks])
    return history


def fit_rank(plan: RunPlan, rank: int) -> None:
    """The work of a rank above 0, in a process of its own. It writes nothing but a log."""
    OwnCode(plan.paths.methods, plan.paths.backbones).add()
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        Console(plan.folder / f"rank{rank}.log", stream=nowhere) as console,
    ):
        setup = assemble(plan, console, rank=rank)
        fit_here(plan, setup, console, [WarmupPhases(console)], rank)


def fit_here(plan: RunPlan, setup: Setup, console: Console, callbacks: list[Callback], rank: int = 0) -> None:
    """Training in this process, together with the other ranks."""
    recipe = plan.recipe
    settings = step_settings(recipe, setup.precision, rank)
    module = FineTuning(setup.model, setup.normalise, recipe, plan.seed, settings, console.note, setup.task)
    trainer = make_trainer(setup.device, callbacks, max_epochs=recipe.max_epochs, devices=recipe.devices)
    train(trainer, module, setup.task, setup.device, plan.folder / CHECKPOINT_FILE)
