"""The objects of a run, built in the order in which mistakes are cheapest to find."""

from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass

import mambapeft_kernels
import torch
from torch import nn

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.data import ConsoleProgress, Preprocessing, TaskDataModule
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.engine.predict import Predictions, apply_precision, predict, resolve_precision
from mambapeft_vision.results.environment import reset_peak_memory
from mambapeft_vision.run.build import build_backbone, build_dataset, set_kernel
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.malloc import keep_freed_memory


@dataclass(frozen=True)
class Setup:
    """What training and testing work on. kernel: the name of the backend that runs; record: CUDA graphs on a GPU."""

    device: torch.device
    kernel: str
    precision: str
    task: TaskDataModule
    model: AdaptedModel
    normalise: Normalise
    record: bool

    def test(self, console: Console) -> Predictions:
        """Tests the model as it is now on the task's test split."""
        return predict(
            self.model,
            self.normalise,
            self.task.test_dataloader(),
            precision=self.precision,
            device=self.device,
            console=console,
            record=self.record,
        )


@dataclass(frozen=True)
class Sources:
    """Where a run's task and backbone come from. A sweep gives its own, which keep what is loaded between runs."""

    task: Callable[[RunPlan], TaskDataModule] = build_dataset
    backbone: Callable[[RunPlan], nn.Module] = build_backbone


FRESH = Sources()


def assemble(
    plan: RunPlan,
    attach: Callable[[nn.Module, int], AdaptedModel],
    *,
    device: torch.device,
    kernel: str,
    console: Console,
    sources: Sources = FRESH,
) -> Setup:
    """Builds a run's model and loads its data.

    Args:
        attach: from the backbone and the number of classes to the adapted model; it may change the backbone.
        kernel: as asked for, e.g. "auto".
    Raises: UserError.
    """
    if device.type == "cpu":
        keep_freed_memory()
    reset_peak_memory(device)
    precision = resolve_precision(plan.recipe.precision, device)
    apply_precision(precision)
    task = sources.task(plan)
    task.check()  # before weights are fetched: missing data is the commonest mistake
    backbone = sources.backbone(plan)
    resolved = set_kernel(backbone, kernel, device)
    console.say(mambapeft_kernels.describe(kernel, device))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    compilations = backbone.compile_ahead(resolved, dtype, device)  # beside the decoding
    model = attach(backbone, task.num_classes)
    preprocessing = Preprocessing.from_timm(backbone.default_cfg)
    task.load(preprocessing, ConsoleProgress(f"decode {task.name}", "images"))
    if task.train_set.images.device != device:
        task.train_set = task.train_set.to(device)  # and there they stay: a step chooses its batch on the device
    wait(compilations)
    return Setup(device, resolved, precision, task, model, Normalise(preprocessing), plan.recipe.cuda_graph)
