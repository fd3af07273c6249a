"""The objects of a run, built in the order in which mistakes are cheapest to find."""

from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial

import mambapeft_kernels
import torch

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.data import ConsoleProgress, Preprocessing, TaskDataModule
from mambapeft_vision.engine.distributed import device_of_rank
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.engine.precision import apply_precision, resolve_precision
from mambapeft_vision.run.build import build_backbone, build_dataset, build_model, set_kernel
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.environment import reset_peak_memory
from mambapeft_vision.utils.malloc import keep_freed_memory
from mambapeft_vision.utils.text import LONGEST_NOTE, plain
from mambapeft_vision.utils.timeline import mark


@dataclass(frozen=True)
class Setup:
    """What training and testing need: the task, the model, and where and how they are computed.

    Args:
        kernel: name of the backend that runs.
        precision: the resolved one.
        cuda_graph: whether to capture CUDA graphs, on a GPU.
    """

    device: torch.device
    kernel: str
    precision: str
    task: TaskDataModule
    model: AdaptedModel
    normalise: Normalise
    cuda_graph: bool


@dataclass(frozen=True)
class Sources:
    """Where a run's task and backbone come from. A sweep gives its own, which keep what is loaded between runs."""

    task: Callable[[RunPlan], TaskDataModule] = build_dataset
    backbone: Callable[[RunPlan], Backbone] = build_backbone


FRESH = Sources()


def assemble(
    plan: RunPlan,
    console: Console,
    *,
    sources: Sources = FRESH,
    attach: Callable[[Backbone, int], AdaptedModel] | None = None,
    device: str | None = None,
    kernel: str | None = None,
    rank: int = 0,
    test_only: bool = False,
) -> Setup:
    """Builds a run's model and loads its data.

    Args:
        sources: sources of task and backbone.
        attach: from the backbone and the number of classes to the adapted model; it may change the backbone. Default:
            the plan's methods.
        device, kernel: instead of the plan's.
        rank: rank of this process in its run.
        test_only: load no training images, and lay out no task.

    Raises: UserError.
    """
    attach = partial(build_model, plan) if attach is None else attach
    kernel = plan.kernel if kernel is None else kernel
    place = device_of_rank(plan.recipe.device if device is None else device, plan.recipe.devices, rank)
    if rank and place.type == "cuda":
        torch.cuda.set_device(place)
    if place.type == "cpu":
        keep_freed_memory()
    reset_peak_memory(place)
    precision = resolve_precision(plan.recipe.precision, place)
    apply_precision(precision)
    mark("device")
    task = sources.task(plan)
    task.check(test_only=test_only)  # before weights are fetched: missing data is the commonest mistake
    for note in task.notes:
        console.say(f"data: {plain(note, LONGEST_NOTE)}")
    mark("task")
    backbone = sources.backbone(plan)
    mark("backbone")
    backend = set_kernel(backbone, kernel, place)
    console.say(mambapeft_kernels.describe(kernel, place))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    compilations = backbone.compile_ahead(backend, dtype, place)  # beside the decoding
    model = attach(backbone, task.num_classes)
    model.class_names, model.multi_label = task.class_names, task.multi_label
    mark("model")
    preprocessing = Preprocessing.from_timm(backbone.default_cfg)
    progress = ConsoleProgress(f"decode {task.name}", "images")
    if test_only:
        task.load_test(preprocessing, progress)
    else:
        task.load(preprocessing, progress)
        if task.train_set.images.device != place:
            task.train_set = task.train_set.to(place)  # and there they stay: a step chooses its batch on the device
    mark("images")
    wait(compilations)
    mark("kernels")
    return Setup(place, backend, precision, task, model, Normalise(preprocessing), plan.recipe.cuda_graph)
