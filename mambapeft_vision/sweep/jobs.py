"""From a sweep's command line to its runs, and what is already done of each."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig

from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.engine.checkpoint import CHECKPOINT_FILE
from mambapeft_vision.results.record import is_finished, read_record
from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.run.overrides import glob_options, sweep_name
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.sweep.input_hashes import Inputs

ALL_TASKS = f"dataset={','.join(task.name for task in TASKS.values())}"


class State(Enum):
    """What there is of a run before the sweep."""

    NEW = "new"
    BEGUN = "begun"  # it continues from a checkpoint
    FINISHED = "finished"
    OUTDATED = "outdated"  # finished on other images or weights than there are now: it runs again


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    label: the choices that make it differ from the others; cfg: many runs may share it, then the plan has each one's
    seed, and `sections` replace its own; turn: runs of a lower one are begun first; outdated: of an outdated run's
    record, when it was finished.
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


def plan_jobs(arguments: Sequence[str], configs: Path) -> list[Job]:
    """The runs that a sweep's overrides stand for, in their order; a run named twice is planned once.

    Args:
        arguments: Hydra overrides, where commas, range() and glob() list choices; without one of `dataset`, the 19
            tasks of VTAB-1K are taken.
        configs: folder with train.yaml.
    Raises: UserError and Hydra's exceptions for mistakes in any of the runs.
    """
    register_schemas()
    with initialize_config_dir(str(configs), version_base="1.3"):
        if not any(argument.partition("=")[0] == "dataset" for argument in arguments):
            arguments = [ALL_TASKS, *arguments]
        product = itertools.product(*_choices(arguments, configs))
        sweep = sweep_name(arguments)
        composed = [job for choices in product for job in _compose(choices, sweep)]
    inputs = Inputs()
    jobs = {plan.folder: _job(label, texts, cfg, plan, inputs) for label, texts, cfg, plan in composed}
    return list(jobs.values())


def _job(label: str, overrides: list[str], cfg: DictConfig, plan: RunPlan, inputs: Inputs) -> Job:
    state = state_of(plan, inputs)
    outdated = read_record(plan.folder).finished_at if state is State.OUTDATED else None
    return Job(label, overrides, cfg, plan, state, outdated=outdated)


def state_of(plan: RunPlan, inputs: Inputs) -> State:
    if is_finished(plan.folder):
        return State.FINISHED if inputs.made(read_record(plan.folder), plan) else State.OUTDATED
    return State.BEGUN if (plan.folder / CHECKPOINT_FILE).is_file() else State.NEW


@dataclass(frozen=True)
class _Choice:
    """One value of one override; swept: it has others too."""

    key: str
    values: tuple[str, ...]  # of seeds all, of anything else one
    swept: bool

    def texts(self) -> list[str]:
        return [f"{self.key}={value}" for value in self.values]


def _choices(arguments: Sequence[str], configs: Path) -> list[list[_Choice]]:
    found = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key, _, text = override.input_line.partition("=")
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


def _compose(choices: Sequence[_Choice], sweep: str) -> list[tuple[str, list[str], DictConfig, RunPlan]]:
    fixed = [text for choice in choices if choice.key != "seed" for text in choice.texts()]
    base = compose("train", fixed)
    base.sweep = base.sweep or sweep
    seeds = next((choice for choice in choices if choice.key == "seed"), None)
    jobs = []
    for seed in seeds.texts() if seeds else [f"seed={base.seed}"]:
        cfg = copy.deepcopy(base)
        cfg.seed = seed.partition("=")[2]
        swept = [text for choice in choices if choice.swept and choice.key != "seed" for text in choice.texts()]
        label = " ".join(text.rpartition("=")[2] for text in swept) + f" {seed.replace('=', ' ')}"
        jobs.append((label.strip(), [*fixed, seed], cfg, make_plan(cfg)))
    return jobs
