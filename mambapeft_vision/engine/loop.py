"""Training proper: a Lightning trainer with our callbacks, continued from the run's checkpoint where there is one."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from mambapeft_vision.engine.callbacks import (
    Checkpoints,
    History,
    ProgressLine,
    Row,
    StopAtNonFinite,
    StopAtSigterm,
    WarmupPhases,
)
from mambapeft_vision.engine.checkpoint import CHECKPOINT_FILE, AtomicCheckpointIO
from mambapeft_vision.engine.distributed import SummedGradients, other_ranks, sum_over_ranks
from mambapeft_vision.engine.module import FineTuning
from mambapeft_vision.engine.step import StepSettings
from mambapeft_vision.methods import add_methods_folder
from mambapeft_vision.run.assemble import Setup, assemble
from mambapeft_vision.run.build import build_model, resolve_device
from mambapeft_vision.run.config import STOP, TrainerConfig
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.errors import UserError

METRICS_FILE = "metrics.csv"


def fit(plan: RunPlan, setup: Setup, log_epoch: Callable[[Row], None], console: Console) -> History:
    """Trains to the last epoch and returns the history.

    Raises: NotFiniteError at NaN or infinity; KeyboardInterrupt at Ctrl-C.
    """
    checkpoint = plan.folder / CHECKPOINT_FILE
    history = History(plan.folder / METRICS_FILE, log_epoch)
    callbacks = [
        StopAtNonFinite(plan.task, plan.method_names, checkpoint, plan.recipe.on_nonfinite == STOP),
        history,
        ProgressLine(console, history),
        WarmupPhases(console),
        Checkpoints(checkpoint, plan.recipe.checkpoint_every_s),
        StopAtSigterm(checkpoint),
    ]
    if checkpoint.is_file():
        console.say(f"continues from {checkpoint}")
    devices = plan.recipe.devices
    phased = [name for name, method in setup.model.methods.items() if method.warming_up]
    if devices > 1 and phased:
        raise UserError(f"trainer.devices={devices}: {phased[0]} chooses what to train on one device; set it to 1")
    if setup.device.type == "cuda":  # on a CPU the two would share the cores
        setup.task.prefetch_test()
    try:
        with other_ranks(devices, partial(fit_rank, plan)):
            _fit(plan, setup, callbacks, console, rank=0)
    except SystemExit as end:
        if end.code != 1:  # a cluster's, such as Submitit's when it has the job requeued
            raise
        raise KeyboardInterrupt from end  # Lightning's answer to Ctrl-C
    return history


def fit_rank(plan: RunPlan, rank: int) -> None:
    """What a rank above 0 does of a run: everything but writing and printing, into a log of its own."""
    if plan.config["paths"]["methods"] is not None:
        add_methods_folder(plan.config["paths"]["methods"])
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        Console(plan.folder / f"rank{rank}.log", stream=nowhere) as console,
    ):
        device = resolve_device(plan.recipe.device)
        if device.type == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        attach = partial(build_model, plan)
        setup = assemble(plan, attach, device=device, kernel=plan.config["kernel"], console=console)
        _fit(plan, setup, [WarmupPhases(console)], console, rank)


def _fit(plan: RunPlan, setup: Setup, callbacks: list[Callback], console: Console, rank: int) -> None:
    checkpoint = plan.folder / CHECKPOINT_FILE
    trainer = make_trainer(plan.recipe, setup.device, callbacks)
    settings = step_settings(plan.recipe, setup.precision, rank)
    module = FineTuning(setup.model, setup.normalise, plan.recipe, plan.seed, settings, console.note)
    try:
        with own_stream(setup.device):
            trainer.fit(module, datamodule=setup.task, ckpt_path=checkpoint if checkpoint.is_file() else None)
    except BaseException:
        with suppress(Exception):  # of a device that is broken: what broke it counts
            module.release()
        raise
    module.release()


def step_settings(recipe: TrainerConfig, precision: str, rank: int = 0) -> StepSettings:
    """precision: the resolved one; rank: of this process."""
    reduce = sum_over_ranks if recipe.devices > 1 else None
    return StepSettings(precision, recipe.clip_norm, recipe.micro_batch, recipe.cuda_graph, rank, reduce)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own on a GPU: a step cannot be recorded on the default one."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def make_trainer(recipe: TrainerConfig, device: torch.device, callbacks: list[Callback]) -> Trainer:
    """A Lightning trainer that does the recipe and nothing of its own: no logs, files, bars or validation."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # advice on its own loaders and checkpoints
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # between Lightning and PyTorch
    several = recipe.devices > 1
    one_gpu = device.type == "cuda" and not several
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if one_gpu else recipe.devices,
        strategy=SummedGradients() if several else "auto",
        use_distributed_sampler=False,  # our loader takes each rank's part itself
        max_epochs=recipe.max_epochs,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],  # our own processes, also inside a Slurm job
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
