"""Search spaces: configs/search/*.yaml, and how a trial turns them into methods and trainer settings."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from mambapeft_vision.adapter.presets import Preset
from mambapeft_vision.run.exit import nearest
from mambapeft_vision.utils.errors import UserError

CHOICES = ("all", "subset", "drop_one")
NONE = "none"
NOTHING_CHOSEN = {"linear_probe": {"_target_": "mambapeft_vision.methods.linear_probe.LinearProbe"}}


class Trial(Protocol):
    """What Optuna's trials offer."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Range:
    """Of one setting; whole numbers where both ends are."""

    low: float
    high: float
    step: int = 1
    log: bool = False

    def suggest(self, trial: Trial, name: str) -> float:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, step=self.step, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Part:
    """A method with its fixed settings, and the ranges of the others."""

    spec: Mapping[str, Any]
    tune: Mapping[str, Range]


@dataclass(frozen=True)
class Point:
    """What one trial runs: methods by name, and the trainer's changed settings."""

    methods: dict[str, dict[str, Any]]
    trainer: dict[str, Any]


@dataclass(frozen=True)
class Space:
    """choose: all, subset (each part on or off) or drop_one (one part or none is left out)."""

    choose: str
    tasks: tuple[str, ...]
    parts: Mapping[str, Part]
    trainer_fixed: Mapping[str, Any]
    trainer_tune: Mapping[str, Range]

    def suggest(self, trial: Trial) -> Point:
        """Every setting is asked for, also of parts that are left out: TPE models a space that stays the same."""
        chosen = self._chosen(trial)
        methods = {
            name: {**part.spec, **{key: r.suggest(trial, f"{name}.{key}") for key, r in part.tune.items()}}
            for name, part in self.parts.items()
        }
        trainer = {key: r.suggest(trial, f"trainer.{key}") for key, r in self.trainer_tune.items()}
        kept = {name: spec for name, spec in methods.items() if name in chosen}
        return Point(kept or NOTHING_CHOSEN, {**self.trainer_fixed, **trainer})

    def _chosen(self, trial: Trial) -> set[str]:
        if self.choose == "subset":
            return {name for name in self.parts if trial.suggest_categorical(f"use.{name}", [True, False])}
        if self.choose == "drop_one":
            return set(self.parts) - {trial.suggest_categorical("drop", [NONE, *self.parts])}
        return set(self.parts)


def read_space(path: Path, presets: Mapping[str, Preset], preset: str | None = None) -> Space:
    """Reads a space.

    Args:
        presets: configs/method, which the parts are based on.
        preset: whose methods are the parts, for a space without `parts`.
    Raises: UserError naming the file and what is wrong in it.
    """
    if not path.is_file():
        known = [file.stem for file in path.parent.glob("*.yaml")]
        raise UserError(f"search space {path.stem} does not exist; {nearest(path.stem, known)}")
    content = OmegaConf.to_container(OmegaConf.load(path))
    _check(path, content, ("choose", "tasks", "parts", "every_part", "trainer"))
    if content.get("choose") not in CHOICES:
        raise UserError(f"{path}: choose: {content.get('choose')!r}; expected one of {', '.join(CHOICES)}")
    trainer = content.get("trainer", {})
    _check(path, trainer, ("fixed", "tune"))
    shared = _ranges(path, content.get("every_part", {}).get("tune", {}))
    base = presets[preset] if preset else None
    changes = content.get("parts") or {name: {} for name in (base.methods if base else ())}
    if not changes:
        raise UserError(f"{path} lists no parts; expected `parts:`, or give it to scripts/tune.py with method=...")
    return Space(
        choose=content["choose"],
        tasks=tuple(content["tasks"]),
        parts={name: _part(path, name, change, presets, base, shared) for name, change in changes.items()},
        trainer_fixed={**(base.overrides.get("trainer", {}) if base else {}), **trainer.get("fixed", {})},
        trainer_tune=_ranges(path, trainer.get("tune", {})),
    )


def _part(
    path: Path,
    name: str,
    change: Mapping[str, Any],
    presets: Mapping[str, Preset],
    base: Preset | None,
    shared: Mapping[str, Range],
) -> Part:
    _check(path, change, ("fixed", "tune"))
    if base is None and (name not in presets or name not in presets[name].methods):
        raise UserError(f"{path}: part {name} is no preset of one method; {nearest(name, presets)}")
    spec = {**(base or presets[name]).methods[name], **change.get("fixed", {})}
    known = _settings_of(spec["_target_"])
    tune = {**{k: r for k, r in shared.items() if k in known}, **_ranges(path, change.get("tune", {}))}
    for key in (*change.get("fixed", {}), *tune):
        if key not in known:
            raise UserError(f"{path}: {name} has no setting {key}; {nearest(key, known)}")
    return Part(spec, tune)


def _settings_of(target: str) -> set[str]:
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _ranges(path: Path, content: Mapping[str, Mapping[str, Any]]) -> dict[str, Range]:
    ranges = {}
    for key, given in content.items():
        _check(path, given, ("low", "high", "step", "log"))
        if not {"low", "high"} <= given.keys() or not given["low"] < given["high"]:
            raise UserError(f"{path}: {key}: {dict(given)}; expected low and high, and low below high")
        ranges[key] = Range(**given)
    return ranges


def _check(path: Path, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{path}: {key} is unknown; {nearest(key, known)}")
