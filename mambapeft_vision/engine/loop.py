"""The training loop: Lightning's, on a stream of its own, continued from a checkpoint where there is one."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from mambapeft_vision.engine.checkpoint import AtomicCheckpointIO
from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.engine.distributed import SummedGradients, sum_over_ranks
from mambapeft_vision.engine.module import TrainingModule
from mambapeft_vision.engine.step import StepSettings


def train(
    trainer: Trainer,
    module: TrainingModule,
    data: LightningDataModule | Iterable[Any],
    device: torch.device,
    checkpoint: Path,
) -> None:
    """Trains `module` to its end, from `checkpoint` where that is a file. Its captured steps are released."""
    found = checkpoint if checkpoint.is_file() else None
    try:
        with _own_stream(device):
            if isinstance(data, LightningDataModule):
                trainer.fit(module, datamodule=data, ckpt_path=found)
            else:
                trainer.fit(module, data, ckpt_path=found)
    except BaseException:
        with suppress(Exception):  # a broken device raises again here; only the first error is of use
            module.release()
        raise
    module.release()


def make_trainer(device: torch.device, callbacks: list[Callback], *, max_epochs: int, devices: int = 1) -> Trainer:
    """A Lightning trainer that runs epochs and callbacks, and writes, shows and validates nothing of its own.

    What is switched off is done elsewhere: metrics, files and the progress line by our callbacks, checkpoints by
    `Checkpoints`, the part of a batch that a rank takes by our loader.

    Args:
        max_epochs: -1 for no limit.
        devices: ranks, one a device.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # advice on its own loaders and checkpoints
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # between Lightning and PyTorch
    one_gpu = device.type == "cuda" and devices == 1
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if one_gpu else devices,
        strategy=SummedGradients() if devices > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=max_epochs,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],  # our own processes, also inside a Slurm job
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def step_settings(recipe: TrainerConfig, precision: str, rank: int = 0) -> StepSettings:
    """How a recipe's steps are taken.

    Args:
        precision: the resolved one.
        rank: rank of this process.
    """
    reduce = sum_over_ranks if recipe.devices > 1 else None
    return StepSettings(precision, recipe.clip_norm, recipe.micro_batch, recipe.cuda_graph, rank, reduce)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own on a GPU: the default one cannot be captured."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
