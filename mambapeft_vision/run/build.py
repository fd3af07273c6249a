"""From a plan's sections to objects. Unknown arguments are mistakes in a named config group, never a traceback."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.model import AdaptedModel, adapt, on_meta
from mambapeft_vision.adapter.scaling import scaled
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.backbones.registry import MAX_PARAMETERS
from mambapeft_vision.backbones.weights import load_weights
from mambapeft_vision.data import TaskDataModule
from mambapeft_vision.integrations.wandb_logger import NoLogger, RunLogger, WandbLogger
from mambapeft_vision.methods.method import Method
from mambapeft_vision.run.config import OF_VIM_S
from mambapeft_vision.run.own_code import OwnCode
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import check_arguments

_TARGET = re.compile(r"mambapeft_vision(\.[a-z]\w*)*\.[A-Za-z]\w*")
# What each section may name. A config can come from anybody, so it must not be able to call any function.
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "backbone": (
        "mambapeft_vision.backbones.create_backbone",
        lambda found: found is create_backbone,
    ),
    "dataset": (
        "mambapeft_vision.data.TaskDataModule or a subclass in mambapeft_vision",
        lambda found: isinstance(found, type) and issubclass(found, TaskDataModule),
    ),
    "logger": (
        "mambapeft_vision.integrations.wandb_logger.NoLogger or WandbLogger",
        lambda found: found in (NoLogger, WandbLogger),
    ),
}


def build(group: str, section: Mapping[str, Any]) -> Any:
    """Calls a section's `_target_` with the section's other keys.

    Args:
        group: the config group, such as "dataset"; `_EXPECTED` says which targets it may name.
        section: the composed section.
    Raises: UserError naming the group and the unknown or missing key.
    """
    arguments = dict(section)
    target = arguments.pop("_target_", None)
    expected, fits = _EXPECTED[group]
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise UserError(f"{group}._target_={target!r}; expected {expected}")
    function = _locate(target, group)
    if not fits(function):
        raise UserError(f"{group}._target_={target!r}; expected {expected}")
    check_arguments(function, arguments, group)
    return function(**arguments)


def build_dataset(plan: RunPlan) -> TaskDataModule:
    """The task of the section `dataset`; its splits of own images are recorded below paths.data."""
    return build("dataset", {**plan.dataset, "cache": plan.paths.cache, "records": str(Path(plan.paths.data) / "own")})


def build_backbone(plan: RunPlan) -> Backbone:
    """The backbone of the section `backbone`, with its weights."""
    return _build_backbone(plan)


def build_logger(plan: RunPlan) -> RunLogger:
    """The logger of the section `logger`."""
    return build("logger", plan.logger)


def build_methods(plan: RunPlan, backbone: Backbone) -> dict[str, Method]:
    """The methods by name, sized for `backbone`. Only classes inside mambapeft_vision.methods are ever called."""
    specs = scaled(plan.method_specs, backbone) if plan.method_sizes == OF_VIM_S else plan.method_specs
    return {name: build_method(name, spec, "method") for name, spec in specs.items()}


def build_model(plan: RunPlan, backbone: Backbone, num_classes: int) -> AdaptedModel:
    """`backbone` with the plan's methods and a new head. Raises UserError for methods beyond all memory."""
    _check_sizes(plan, backbone, num_classes)
    return adapt(backbone, build_methods(plan, backbone), num_classes, plan.seed)


def _check_sizes(plan: RunPlan, backbone: Backbone, num_classes: int) -> None:
    """Raises UserError for methods that would take the memory of a machine; found on shapes alone."""
    with torch.device("meta"):
        try:
            model = adapt(on_meta(backbone), build_methods(plan, backbone), num_classes, plan.seed)
        except RuntimeError as error:  # PyTorch's, for sizes beyond all memory
            largest = max(_whole_numbers(plan.method_specs), default=0)
            if largest <= MAX_PARAMETERS:
                raise
            raise UserError(
                f"method={plan.method_names}: impossible sizes: got {largest}, expected numbers far below "
                f"{MAX_PARAMETERS:,}; lower them"
            ) from error
    count = sum(parameter.numel() for parameter in model.trained().values())
    if count > MAX_PARAMETERS:
        raise UserError(
            f"method={plan.method_names} would train {count:,} parameters; expected at most {MAX_PARAMETERS:,}. "
            f"Lower its sizes"
        )


def _whole_numbers(value: Any) -> Iterator[int]:
    """Those in a tree of mappings and sequences."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _whole_numbers(item)


def build_backbone_without_weights(plan: RunPlan) -> Backbone:
    """The backbone with random weights, or on PyTorch's meta device with none."""
    return _build_backbone(plan, weights="random", weights_sha256=None)


def build_backbone_offline(plan: RunPlan) -> tuple[Backbone, str]:
    """The backbone without any download, and what its weights are; for dry runs."""
    section = plan.backbone
    if section.get("weights") != "official":
        return build_backbone(plan), f"weights: {section.get('weights')}"
    backbone: Any = _build_backbone(plan, weights="random")
    repository, file = (backbone.default_cfg.get(key) for key in ("hf_hub_id", "hf_hub_filename"))
    if repository is None:  # in the package, or nowhere
        return build_backbone(plan), "weights: official"
    cached = try_to_load_from_cache(repository, file)
    if not isinstance(cached, str):
        return backbone, "weights: random here, as the official ones have not been downloaded yet"
    load_weights(backbone, cached)
    return backbone, "weights: official"


def _build_backbone(plan: RunPlan, **instead: Any) -> Backbone:
    OwnCode(backbones=plan.paths.backbones).add()
    return build("backbone", {**plan.backbone, **instead})


def set_kernel(backbone: Backbone, kernel: str, device: torch.device) -> str:
    """Chooses the kernel backend and returns its name. Raises UserError for one that cannot run here."""
    try:
        return backbone.set_kernel(kernel, device)
    except ValueError as error:
        raise UserError(str(error)) from error


def _locate(target: str, group: str) -> Callable[..., Any]:
    module, _, attribute = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{group}._target_={target} does not exist: {error}") from error
