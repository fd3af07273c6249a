"""Every key of a config with its type, default and meaning, from the schemas and the yaml files."""

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from mambapeft_vision.pretraining.config import PretrainConfig
from mambapeft_vision.run.compose import compose
from mambapeft_vision.run.config import EvaluateConfig, TrainConfig

SCHEMAS: Mapping[str, type] = {"train": TrainConfig, "evaluate": EvaluateConfig, "pretrain": PretrainConfig}


@dataclass(frozen=True)
class Key:
    """One key. default: as on a command line; empty for sections, and for values that must be given."""

    name: str
    kind: str
    default: str
    meaning: str


def reference(root: str = "train") -> list[Key]:
    """The keys of a config, sections before what is in them.

    Args:
        root: "train", "evaluate" or "pretrain".
    """
    cfg = OmegaConf.structured(PretrainConfig) if root == "pretrain" else compose(root, [])
    return list(_keys(SCHEMAS[root], typing.cast(dict[str, Any], OmegaConf.to_container(cfg)), ""))


def meanings(schema: type) -> dict[str, str]:
    """What the docstring of a schema says of its keys."""
    _, _, arguments = (inspect.getdoc(schema) or "").partition("Args:")
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _keys(schema: type, defaults: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    hints, said = typing.get_type_hints(schema), meanings(schema)
    for field in dataclasses.fields(schema):
        name, kind, default = f"{prefix}{field.name}", hints[field.name], defaults.get(field.name)
        section = _section(kind)
        shown = "" if isinstance(default, dict) or default == "???" else _shown(default)
        yield Key(name, "section" if section or _is_open(kind) else _kind(kind), shown, said[field.name])
        if section is not None:
            inner = default if section is kind else OmegaConf.to_container(OmegaConf.structured(section))
            below = name if section is kind else f"{name}.NAME"
            yield from _keys(section, typing.cast(dict[str, Any], inner), f"{below}.")


def _section(kind: Any) -> type | None:
    """The schema of a section, or of every entry of one whose entries have names of their own."""
    inner = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else kind
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _is_open(kind: Any) -> bool:
    """Whether a section's keys are the arguments of its target, not those of a schema."""
    return kind is Any or typing.get_origin(kind) is dict


def _kind(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        return " or ".join(map(_kind, typing.get_args(annotation)))
    if typing.get_origin(annotation) is list:
        return f"list of {_kind(typing.get_args(annotation)[0])}"
    return "null" if annotation is types.NoneType else str(annotation.__name__)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
