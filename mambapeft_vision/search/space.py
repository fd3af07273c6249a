"""Search spaces: configs/search/*.yaml, and how a trial turns them into methods and trainer settings."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mambapeft_vision.adapter.presets import Preset
from mambapeft_vision.run.exit import nearest
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.typed import build
from mambapeft_vision.utils.untrusted import read_yaml

CHOICES = ("all", "subset", "drop_one")
NONE = "none"
NOTHING_CHOSEN = {"linear_probe": {"_target_": "mambapeft_vision.methods.linear_probe.LinearProbe"}}


class Trial(Protocol):
    """The part of Optuna's trials that a space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Range:
    """The range of one setting. Its values are whole numbers if both ends are."""

    low: int | float
    high: int | float
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
    """The runs of one trial: methods by name, and the trainer's changed settings."""

    methods: dict[str, dict[str, Any]]
    trainer: dict[str, Any]


@dataclass(frozen=True)
class Space:
    """A search space: the parts, and how they are chosen.

    choose: all, subset (each part on or off) or drop_one (one part or none is left out)."""

    choose: str
    tasks: tuple[str, ...]
    parts: Mapping[str, Part]
    trainer_fixed: Mapping[str, Any]
    trainer_tune: Mapping[str, Range]

    def suggest(self, trial: Trial) -> Point:
        """Asks for every setting, also of parts that are left out, because TPE models a fixed space."""
        chosen = self._chosen(trial)
        methods = {
            name: {**part.spec, **{key: r.suggest(trial, f"{name}.{key}") for key, r in part.tune.items()}}
            for name, part in self.parts.items()
        }
        trainer = {key: r.suggest(trial, f"trainer.{key}") for key, r in self.trainer_tune.items()}
        kept = {name: spec for name, spec in methods.items() if name in chosen}
        return Point(kept or NOTHING_CHOSEN, {**self.trainer_fixed, **trainer})

    def point_of(self, params: Mapping[str, Any]) -> Point:
        """The point of recorded parameters, e.g. of the best trial of a study that came from elsewhere.

        Raises: UserError for parameters that are no point of this space.
        """
        return self.suggest(_Recorded(params))

    def _chosen(self, trial: Trial) -> set[str]:
        if self.choose == "subset":
            return {name for name in self.parts if trial.suggest_categorical(f"use.{name}", [True, False])}
        if self.choose == "drop_one":
            return set(self.parts) - {trial.suggest_categorical("drop", [NONE, *self.parts])}
        return set(self.parts)


@dataclass(frozen=True)
class _Recorded:
    """A trial with known parameters, which returns each of them if it lies within the range asked for."""

    params: Mapping[str, Any]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        value = self.params.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise _outside(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        value = self.params.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _outside(name, value, f"a whole number from {low} to {high}")
        return value

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self.params.get(name)
        for choice in choices:
            if choice == value and type(choice) is type(value):
                return choice
        raise _outside(name, value, f"one of {', '.join(map(str, choices))}")


def _outside(name: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"the study has {name}={shown(value)}; expected {expected}. It does not fit this space: give the search "
        f"another name"
    )


def read_space(path: Path, presets: Mapping[str, Preset], preset: str | None = None) -> Space:
    """Reads a space.

    Args:
        presets: configs/method, which the parts are based on.
        preset: the preset whose methods are the parts, for a space without `parts`.
    Raises: UserError naming the file and what is wrong in it.
    """
    if not path.is_file():
        known = [file.stem for file in path.parent.glob("*.yaml")]
        raise UserError(f"search space {path.stem} does not exist; {nearest(path.stem, known)}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys; expected choose, tasks, parts, every_part or trainer")
    _check(path, content, ("choose", "tasks", "parts", "every_part", "trainer"))
    if content.get("choose") not in CHOICES:
        raise UserError(f"{path}: choose: {shown(content.get('choose'))}; expected one of {', '.join(CHOICES)}")
    tasks = build(list[str], content.get("tasks"), f"{path}: tasks")
    trainer = _section(path, content, "trainer")
    _check(path, trainer, ("fixed", "tune"))
    every_part = _section(path, content, "every_part")
    _check(path, every_part, ("tune",))
    shared = _ranges(path, _section(path, every_part, "tune"))
    base = presets[preset] if preset else None
    changes = _section(path, content, "parts") or {name: {} for name in (base.methods if base else ())}
    if not changes:
        raise UserError(f"{path} lists no parts; expected `parts:`, or mambapeft tune method=...")
    return Space(
        choose=content["choose"],
        tasks=tuple(tasks),
        parts={name: _part(path, name, change, presets, base, shared) for name, change in changes.items()},
        trainer_fixed={**(base.overrides.get("trainer", {}) if base else {}), **_section(path, trainer, "fixed")},
        trainer_tune=_ranges(path, _section(path, trainer, "tune")),
    )


def _part(
    path: Path,
    name: str,
    change: Mapping[str, Any],
    presets: Mapping[str, Preset],
    base: Preset | None,
    shared: Mapping[str, Range],
) -> Part:
    if not isinstance(change, dict):
        raise UserError(f"{path}: {name}: {shown(change)}; expected fixed and tune, or {{}}")
    _check(path, change, ("fixed", "tune"))
    fixed = _section(path, change, "fixed")
    if base is None and (name not in presets or name not in presets[name].methods):
        raise UserError(f"{path}: part {name} is no preset of one method; {nearest(name, presets)}")
    if base is not None and name not in base.methods:
        raise UserError(f"{path}: part {name} is no method of {base.name}; {nearest(name, base.methods)}")
    spec = {**(base or presets[name]).methods[name], **fixed}
    known = _settings_of(spec["_target_"])
    tune = {**{k: r for k, r in shared.items() if k in known}, **_ranges(path, _section(path, change, "tune"))}
    for key in (*fixed, *tune):
        if key not in known:
            raise UserError(f"{path}: {name} has no setting {key}; {nearest(key, known)}")
    return Part(spec, tune)


def _settings_of(target: str) -> set[str]:
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _ranges(path: Path, content: Mapping[str, Any]) -> dict[str, Range]:
    ranges = {}
    for key, given in content.items():
        found = build(Range, given, f"{path}: {key}", remedy="Give low and high, and step or log where they matter")
        if not found.low < found.high:
            raise UserError(f"{path}: {key}: {shown(given)}; expected low and high, and low below high")
        ranges[key] = found
    return ranges


def _section(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping, empty where it is not given."""
    section = content.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: {key}: {shown(section)}; expected keys and values")
    return section


def _check(path: Path, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{path}: {plain(key)} is unknown; {nearest(str(key), known)}")
