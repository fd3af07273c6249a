"""The keys of configs/pretrain/*.yaml, and reading them.

Plain YAML and dataclasses: pretraining runs wherever torch, timm and Pillow do.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mambapeft_vision.utils.errors import UserError


@dataclass(frozen=True)
class SourceConfig:
    """One set of labelled images, with a head of its own.

    path: npz file or class-per-folder tree (mambapeft_vision/data/prepare/importer.py); share: of every batch, in
    proportion to the other sources'; holdout: share of the images kept for validation, where the source marks
    none as `test` or `val`; group: as many consecutive images belong together (pictures of one thing) and are held out together;
    flip, grey, invert: probability of mirroring left to right, of losing colour, of inverting brightness.
    """

    path: str
    share: float = 1.0
    holdout: float = 0.05
    group: int = 1
    flip: float = 0.5
    grey: float = 0.1
    invert: float = 0.0


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images, besides each source's own.

    min_area: smallest share of the image in a random crop; max_aspect: largest ratio of its sides; degrees: largest
    rotation either way; jitter: brightness, contrast and saturation are multiplied by 1 ± jitter; erase: probability
    of blanking a rectangle.
    """

    min_area: float = 0.4
    max_aspect: float = 4 / 3
    degrees: float = 10.0
    jitter: float = 0.4
    erase: float = 0.25


@dataclass(frozen=True)
class TeacherConfig:
    """EfficientNet-Lite0, whose features are to be predicted too (mambapeft_vision/pretraining/teacher.py).

    weight: of this loss beside that of the labels; size: pixels to a side of the images that the teacher sees.
    """

    weight: float = 1.0
    size: int = 128


@dataclass(frozen=True)
class PretrainConfig:
    """A whole pretraining run.

    Exactly one of `steps` and `minutes` is given; with `minutes` the number of steps follows from the measured
    speed, so that the schedule ends in time. warmup_steps: linear, then a cosine to min_lr. ema: decay of the
    average of the weights, which is what is validated and saved. precision: fp32 or bf16 (mixed). cuda_graph: on a
    GPU, replay one recorded step. workers: processes that decode; null: one a CPU. checkpoint_every_s: seconds between
    checkpoints, from which the same command continues an interrupted run. teacher: null, or its keys ({} takes them as
    they are).
    """

    backbone: str
    sources: dict[str, SourceConfig]
    out: str
    architecture: dict[str, Any] = field(default_factory=dict)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0
    batch_size: int = 1024
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 2e-3
    min_lr: float = 1e-5
    warmup_steps: int = 300
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    ema: float = 0.999
    kernel: str = "auto"
    device: str = "auto"
    precision: str = "bf16"
    cuda_graph: bool = True
    workers: int | None = None
    evaluations: int = 8
    checkpoint_every_s: float = 60.0
    teacher: TeacherConfig | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise UserError(f"steps={self.steps}, minutes={self.minutes}: give exactly one of them.")
        if not self.sources:
            raise UserError("sources is empty: name at least one source with its path.")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision={self.precision!r}: expected fp32 or bf16.")
        if self.batch_size < len(self.sources):
            raise UserError(f"batch_size={self.batch_size}: expected at least one image for each source.")


def load_config(file: Path | str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Reads a YAML file; each override is `key=value` or `key.key=value`, its value in YAML. Raises UserError."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file} is missing: expected a config such as configs/pretrain/vim_nano.yaml.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for override in overrides:
            _override(content, override)
    except yaml.YAMLError as error:
        raise UserError(f"{file} or an override is not valid YAML: {error}") from error
    return _build(PretrainConfig, content, str(file))


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    *parents, key = path.split(".")
    if not equals or not all((*parents, key)):
        raise UserError(f"override {override!r}: expected key=value, such as minutes=5 or augment.jitter=0.2.")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"override {override!r}: {parent} holds the value {content!r}, not keys.")
    content[key] = yaml.safe_load(value)


def _build(cls: type, content: Any, where: str) -> Any:
    """A dataclass from a mapping; every unknown, missing or ill-typed key is an error that names it."""
    if not isinstance(content, dict):
        raise UserError(f"{where} is {content!r}: expected keys and values.")
    types = typing.get_type_hints(cls)
    unknown = [key for key in content if key not in types]
    if unknown:
        raise UserError(f"{where} has unknown keys {unknown}: expected some of {', '.join(types)}.")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [key for key in required if content.get(key) is None]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: give {missing[0]}=VALUE.")
    return cls(**{key: _convert(types[key], value, f"{where}: {key}") for key, value in content.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r}: expected keys and values.")
        inner = typing.get_args(kind)[1]
        return {key: _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    options = typing.get_args(kind) or (kind,)
    if dataclasses.is_dataclass(options[0]) and value is not None:
        return _build(options[0], value, where)
    if (value is None and type(None) in options) or Any in options:
        return value
    target = options[0]
    try:
        # YAML 1.1 reads 1e-3 as text, and true is also the whole number 1.
        if isinstance(value, bool) != (target is bool) or (target is int and int(value) != float(value)):
            raise ValueError
        return target(value)
    except (TypeError, ValueError):
        raise UserError(f"{where} is {value!r}: expected {target.__name__}.") from None
