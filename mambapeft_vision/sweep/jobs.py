"""From a sweep's command line to its runs and their states."""

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig, OmegaConf

from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.results.layout import CHECKPOINT_FILE
from mambapeft_vision.results.record import is_finished, read_record
from mambapeft_vision.run.compose import compose
from mambapeft_vision.run.inputs import Inputs
from mambapeft_vision.run.overrides import glob_options, sweep_name
from mambapeft_vision.run.run_config import Resolved, RunPlan, make_plan, seed_is_within

# Swept keys of which a task's config may depend.
MEDDLING = ("dataset", "paths", "experiment", "+", "~")
ALL_TASKS = f"dataset={','.join(task.name for task in TASKS.values())}"


class State(Enum):
    """The state of a run before the sweep."""

    NEW = "new"
    BEGUN = "begun"  # it continues from a checkpoint
    FINISHED = "finished"
    OUTDATED = "outdated"  # finished on images or weights that have changed since: it runs again


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        label: the choices in which it differs from the others.
        cfg: the composed config. Many runs may share it; then the plan has each one's seed, and `sections` replace the
            config's own.
        turn: runs of a lower turn begin first.
        outdated: for an outdated run, the time at which it was finished.
    """

    label: str
    overrides: list[str]
    cfg: DictConfig
    plan: RunPlan
    state: State
    turn: int = 0
    sections: Mapping[str, DictConfig] = field(default_factory=dict)
    outdated: str | None = None

    @property
    def folder(self) -> Path:
        return self.plan.folder

    def config(self) -> DictConfig:
        """The composed config of this run alone."""
        cfg = copy.deepcopy(self.cfg)
        for name, section in self.sections.items():
            cfg[name] = copy.deepcopy(section)
        cfg.seed = self.plan.seed
        return cfg


def plan_jobs(arguments: Sequence[str], configs: Path) -> list[Job]:
    """The runs that a sweep's overrides stand for, in their order; a run named twice is planned once.

    Args:
        arguments: Hydra overrides, where commas, range() and glob() list choices; without one of `dataset`, the 19
            tasks of VTAB-1K are taken.
        configs: folder with train.yaml.
    Raises: UserError and Hydra's exceptions for mistakes in any of the runs.
    """
    if not any(argument.partition("=")[0] == "dataset" for argument in arguments):
        arguments = [ALL_TASKS, *arguments]
    composer = _Composer(sweep_name(arguments), configs)
    inputs, jobs = Inputs(), {}
    for choices in itertools.product(*_choices(arguments, configs)):
        for job in composer.jobs(choices, inputs):
            jobs[job.folder] = job
    return list(jobs.values())


def state_of(plan: RunPlan, inputs: Inputs) -> State:
    """The state of a planned run."""
    return _state(plan, inputs)[0]


def _state(plan: RunPlan, inputs: Inputs) -> tuple[State, str | None]:
    """The state, and for an outdated run the time at which it was finished."""
    if is_finished(plan.folder):
        record = read_record(plan.folder)
        return (State.FINISHED, None) if inputs.made(record, plan) else (State.OUTDATED, record.finished_at)
    return (State.BEGUN if (plan.folder / CHECKPOINT_FILE).is_file() else State.NEW), None


@dataclass(frozen=True)
class _Choice:
    """One value of one override; swept: it has others too."""

    key: str
    values: tuple[str, ...]  # all seeds, or one value of any other key
    swept: bool

    def texts(self) -> list[str]:
        return [f"{self.key}={value}" for value in self.values]


def _choices(arguments: Sequence[str], configs: Path) -> list[list[_Choice]]:
    found = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key, _, text = str(override.input_line).partition("=")
        swept = override.is_sweep_override()
        values = _values(override, configs) if swept else (text,)
        # Seeds change nothing but `seed`: composing once for all of them makes large sweeps start sooner.
        groups = [values] if key == "seed" else [(value,) for value in values]
        found.append([_Choice(key, group, swept) for group in groups])
    return found


def _values(override: Override, configs: Path) -> tuple[str, ...]:
    if isinstance(override.value(), Glob):
        return glob_options(override, [configs])
    return tuple(override.sweep_string_iterator())


class _Composer:
    """Makes the runs of each choice, composing as little as can be: Hydra takes 50 ms for a config, a plan 0.1 ms.

    Configs that differ in the task alone are made from one composed for each task and one for each of the other
    choices, where no value outside of `dataset` refers to it and `dataset` refers to nothing that is swept.
    """

    def __init__(self, sweep: str, configs: Path) -> None:
        self._sweep, self._configs = sweep, configs
        self._composed: dict[tuple[str, ...], _Composed] = {}
        self._first_task: _Choice | None = None
        self._first_with: dict[tuple[str, ...], Sequence[_Choice]] = {}  # first choices of each task

    def jobs(self, choices: Sequence[_Choice], inputs: Inputs) -> Iterator[Job]:
        fixed = [text for choice in choices if choice.key != "seed" for text in choice.texts()]
        own, task = self._parts(choices)
        swept = [text for choice in choices if choice.swept and choice.key != "seed" for text in choice.texts()]
        seeds = next((choice.texts() for choice in choices if choice.key == "seed"), [f"seed={own.cfg.seed}"])
        sections = {} if task is own else {"dataset": task.cfg.dataset}
        for seed in seeds:
            plan = self._plan(own, task, seed)
            label = " ".join(text.rpartition("=")[2] for text in swept) + f" {seed.replace('=', ' ')}"
            state, outdated = _state(plan, inputs)
            yield Job(label.strip(), [*fixed, seed], own.cfg, plan, state, 0, sections, outdated)

    def _parts(self, choices: Sequence[_Choice]) -> tuple["_Composed", "_Composed"]:
        """The config of the choices, and the config whose `dataset` replaces its own."""
        tasks = [choice for choice in choices if choice.swept and choice.key == "dataset"]
        others = [choice for choice in choices if choice.swept and choice.key not in ("seed", "dataset")]
        if len(tasks) == 1 and not any(choice.key.startswith(MEDDLING) for choice in others):
            self._first_task = self._first_task or tasks[0]
            own = self._compose([self._first_task if choice is tasks[0] else choice for choice in choices])
            task = self._compose(self._first_with.setdefault(tasks[0].values, choices))
            if own.dataset_is_apart and task.dataset_is_apart:
                return own, task
        composed = self._compose(choices)
        return composed, composed

    def _compose(self, choices: Sequence[_Choice]) -> "_Composed":
        texts = tuple(text for choice in choices if choice.key != "seed" for text in choice.texts())
        if texts not in self._composed:
            cfg = compose("train", texts, configs=self._configs)
            cfg.sweep = cfg.sweep or self._sweep
            self._composed[texts] = _Composed(cfg)
        return self._composed[texts]

    def _plan(self, own: "_Composed", task: "_Composed", seed: str) -> RunPlan:
        number = seed.partition("=")[2]
        if own.resolved is not None and task.resolved is not None and re.fullmatch(r"\d+", number):
            return own.resolved.plan(int(number), task.resolved)
        cfg = copy.deepcopy(own.cfg)
        cfg.seed = number
        return make_plan(cfg)


class _Composed:
    """A composed config. resolved: None where the seed is a part of a longer value, so that every run is resolved."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.resolved: Resolved | None = None
        if not seed_is_within(cfg):
            self.resolved = Resolved(cfg)

    @cached_property
    def dataset_is_apart(self) -> bool:
        """Whether a change of `dataset` changes no other section, nor other sections it."""
        if self.resolved is None:
            return False
        sections = OmegaConf.to_container(self.cfg, resolve=False)
        assert isinstance(sections, dict)
        for name, section in sections.items():
            references = re.findall(r"\$\{\s*([\w.:]*)", json.dumps(section, default=str))
            roots = {reference.partition(".")[0] for reference in references}
            if name == "dataset" and not roots <= {"dataset", "paths", "seed"}:
                return False
            if name != "dataset" and ("dataset" in roots or "" in roots):
                return False
        return True
