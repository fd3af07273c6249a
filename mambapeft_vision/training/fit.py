"""Training proper: a Lightning trainer with our callbacks, continued from the run's checkpoint where there is one."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from mambapeft_vision.training.callbacks import (
    Checkpoints,
    History,
    ProgressLine,
    Row,
    StopAtNonFiniteLoss,
    WarmupPhases,
)
from mambapeft_vision.training.checkpoint import CHECKPOINT_FILE, AtomicCheckpointIO
from mambapeft_vision.training.config import TrainerConfig
from mambapeft_vision.training.console import Console
from mambapeft_vision.training.module import FineTuning
from mambapeft_vision.training.plan import RunPlan
from mambapeft_vision.training.setup import Setup
from mambapeft_vision.training.step import StepSettings

METRICS_FILE = "metrics.csv"


def fit(plan: RunPlan, setup: Setup, log_epoch: Callable[[Row], None], console: Console) -> History:
    """Trains to the last epoch and returns the history.

    Raises: UserError at a non-finite loss; KeyboardInterrupt at Ctrl-C.
    """
    checkpoint = plan.folder / CHECKPOINT_FILE
    history = History(plan.folder / METRICS_FILE, log_epoch)
    callbacks = [
        StopAtNonFiniteLoss(plan.task, plan.method_names, checkpoint),
        history,
        ProgressLine(console, history),
        WarmupPhases(console),
        Checkpoints(checkpoint, plan.recipe.checkpoint_every_s),
    ]
    resumes = checkpoint.is_file()
    if resumes:
        console.say(f"continues from {checkpoint}")
    trainer = make_trainer(plan.recipe, setup.device, callbacks)
    settings = step_settings(plan.recipe, setup.precision)
    module = FineTuning(setup.model, setup.normalise, plan.recipe, plan.seed, settings, console.note)
    try:
        with own_stream(setup.device):
            trainer.fit(module, datamodule=setup.task, ckpt_path=checkpoint if resumes else None)
    except SystemExit as ctrl_c:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from ctrl_c
    return history


def step_settings(recipe: TrainerConfig, precision: str) -> StepSettings:
    """precision: the resolved one."""
    return StepSettings(precision, recipe.clip_norm, recipe.micro_batch, recipe.cuda_graph)


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
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        max_epochs=recipe.max_epochs,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],  # one process, also inside a Slurm job
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
