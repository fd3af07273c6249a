"""From a plan's sections to objects. Unknown arguments are mistakes in a named config group, never a traceback."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from mambapeft_vision.adapt import AdaptedModel, adapt, build_method
from mambapeft_vision.backbones.checkpoints import load_weights
from mambapeft_vision.data import TaskDataModule
from mambapeft_vision.errors import UserError
from mambapeft_vision.methods.base import Method
from mambapeft_vision.training.cli import nearest
from mambapeft_vision.training.config import OF_VIM_S
from mambapeft_vision.training.loggers import RunLogger
from mambapeft_vision.training.plan import RunPlan
from mambapeft_vision.training.sizes import scaled

_TARGET = re.compile(r"mambapeft_vision(\.\w+)+")


def build(group: str, section: Mapping[str, Any]) -> Any:
    """Calls a section's `_target_`, which must be in mambapeft_vision, with its other keys.

    Raises: UserError naming the group and the unknown or missing key.
    """
    arguments = dict(section)
    target = arguments.pop("_target_", None)
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise UserError(f"{group}._target_={target!r}; expected a class or function in mambapeft_vision")
    function = _locate(target, group)
    _check_arguments(function, arguments, group)
    return function(**arguments)


def build_dataset(plan: RunPlan) -> TaskDataModule:
    return build("dataset", {**plan.config["dataset"], "cache": plan.config["paths"]["cache"]})


def build_backbone(plan: RunPlan) -> nn.Module:
    return build("backbone", plan.config["backbone"])


def build_logger(plan: RunPlan) -> RunLogger:
    return build("logger", plan.config["logger"])


def build_methods(plan: RunPlan, backbone: nn.Module) -> dict[str, Method]:
    """The methods by name, sized for `backbone`. Only classes inside mambapeft_vision.methods are ever called."""
    specs = plan.config["method"]
    if plan.config["method_sizes"] == OF_VIM_S:
        specs = scaled(specs, backbone)
    return {name: _build_method(name, spec) for name, spec in specs.items()}


def build_model(plan: RunPlan, backbone: nn.Module, num_classes: int) -> AdaptedModel:
    return adapt(backbone, build_methods(plan, backbone), num_classes, plan.seed)


def build_backbone_offline(plan: RunPlan) -> tuple[nn.Module, str]:
    """The backbone without any download, and what its weights are; for dry runs."""
    section = plan.config["backbone"]
    if section.get("weights") != "official":
        return build_backbone(plan), f"weights: {section.get('weights')}"
    backbone = build("backbone", {**section, "weights": "random"})
    repository, file = (backbone.default_cfg.get(key) for key in ("hf_hub_id", "hf_hub_filename"))
    if repository is None:  # in the package, or nowhere
        return build_backbone(plan), "weights: official"
    cached = try_to_load_from_cache(repository, file)
    if not isinstance(cached, str):
        return backbone, "weights: random here, as the official ones have not been downloaded yet"
    load_weights(backbone, cached)
    return backbone, "weights: official"


def resolve_device(name: str) -> torch.device:
    """`auto` → the first GPU, or the CPU; else the device itself. Raises UserError when it is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"device={name!r}; expected auto, cpu, cuda or cuda:N")
    index = int(match[1] or 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"device={name}: PyTorch sees {torch.cuda.device_count()} GPUs; choose auto or cpu")
    return torch.device("cuda", index)


def set_kernel(backbone: nn.Module, kernel: str, device: torch.device) -> str:
    """Chooses the kernel backend and returns its name. Raises UserError for one that cannot run here."""
    try:
        return backbone.set_kernel(kernel, device)
    except ValueError as error:
        raise UserError(str(error)) from error


def _build_method(name: str, spec: Any) -> Method:
    if not isinstance(spec, Mapping):
        raise UserError(f"method.{name}={spec!r}; expected a mapping with _target_ and arguments")
    arguments = {key: value for key, value in spec.items() if key != "_target_"}
    try:
        method = build_method(name, spec, "config")
    except UserError as error:
        if isinstance(error.__cause__, TypeError):  # arguments that do not fit: say which would
            _check_arguments(_locate(spec["_target_"], f"method.{name}"), arguments, f"method.{name}")
        raise
    _check_arguments(type(method), arguments, f"method.{name}")
    return method


def _locate(target: str, group: str) -> Callable[..., Any]:
    module, _, attribute = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{group}._target_={target} does not exist: {error}") from error


def _check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], group: str) -> None:
    parameters = inspect.signature(function, eval_str=True).parameters
    known = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(known) == len(parameters):
        for key in arguments:
            if key not in known:
                raise UserError(f"{group}.{key} is no key of {function.__name__}; {nearest(key, known)}")
    for key, value in arguments.items():
        expected = _expected(value, parameters[key].annotation) if key in parameters else None
        if expected is not None:
            raise UserError(f"{group}.{key}={value!r}; expected {expected}")
    missing = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise UserError(f"{group} lacks {', '.join(missing)}, which {function.__name__} needs")


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text"}


def _expected(value: Any, annotation: Any) -> str | None:
    """What an annotation of numbers, text and lists of them asks for, in words; None where `value` is that."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if any(_is_a(value, option) for option in options):
        return None
    words = {_KINDS.get(option, "null" if option in (None, type(None)) else "a list") for option in options}
    return " or ".join(sorted(words))


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (None, type(None)):
        return value is None
    if kind in _KINDS:
        accepted = {float: (int, float), Path: (str, Path)}.get(kind, kind)
        return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if get_origin(kind) in (list, tuple) and get_args(kind):
        item = get_args(kind)[0]
        return isinstance(value, (list, tuple)) and all(_is_a(v, item) for v in value)
    return True  # an annotation that says more than a config can check here
