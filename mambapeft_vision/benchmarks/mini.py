"""The runs of the mini benchmark (docs/benchmarks/mini.md): every preset that fits a backbone on 13 small tasks."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mambapeft_vision.adapter.presets import fitting_presets, read_preset, registered_name
from mambapeft_vision.benchmarks.mini_settings import RATES, SEARCH_TASKS, Setting
from mambapeft_vision.data.generated.mini import IMPORTED
from mambapeft_vision.results.paper import PAPER
from mambapeft_vision.run.compose import compose
from mambapeft_vision.run.exit import nearest
from mambapeft_vision.run.inputs import Inputs
from mambapeft_vision.run.run_config import Resolved
from mambapeft_vision.sweep.jobs import Job, state_of
from mambapeft_vision.utils.errors import UserError

STAGES = {
    "recipe": "every method at the paper's learning rate, on every task with every seed",
    "search": "every method at five learning rates, scored on val200 of five tasks",
    "refine": "four more trials a method around its best rate: decay, and scale or rates in between",
    "tuned": "every method with its best trial's setting, on every task with every seed",
}
TASKS = tuple(task.name for task in IMPORTED.values())
VIM_NANO = "vim_nano"
SEARCH_SPLITS = ("dataset.train_split=train800", "dataset.test_split=val200")
#: Optimiser steps of a run of Vim-S on VTAB-1K, for which the presets' warm-up phases are set.
PAPER_STEPS = 100 * 32


@dataclass(frozen=True)
class Benchmark:
    """The runs of the mini benchmark on one backbone.

    Args:
        configs: the folder with train.yaml.
        methods: names of presets.
        backbone: name of a config (configs/backbone).
        rates: learning rates of the search.
        overrides: Hydra's, for every run.
    """

    configs: Path
    methods: Sequence[str]
    backbone: str = VIM_NANO
    tasks: Sequence[str] = TASKS
    seeds: Sequence[int] = (0, 1, 2)
    rates: Sequence[float] = RATES
    search_tasks: Sequence[str] = SEARCH_TASKS
    overrides: Sequence[str] = ()

    @property
    def given(self) -> list[str]:
        """The overrides of every run."""
        return ["experiment=mini", f"backbone={self.backbone}", *self.overrides]


@dataclass(frozen=True)
class Wanted:
    """Runs of one method with one setting, on some tasks. overrides: Hydra's, which change the preset."""

    method: str
    setting: Setting
    tasks: Sequence[str]
    overrides: tuple[str, ...] = ()


def benchmark_methods(
    configs: Path, chosen: Sequence[str] | None = None, backbone: str = VIM_NANO
) -> tuple[list[str], dict[str, str]]:
    """The presets that fit a backbone in the order of the published table, and why the others do not.

    Args:
        chosen: names of those wanted; None: all.
        backbone: name of a config.
    Raises: UserError for a chosen one that does not fit, or an unknown backbone.
    """
    folder, name = configs / "method", registered_name(configs, backbone)
    fitting, reasons = fitting_presets(folder, name, of_vim_s=True, names=chosen)
    for method in chosen or ():
        if method not in fitting:
            known = [file.stem for file in folder.glob("*.yaml")]
            raise UserError(f"{method} is no method for {backbone}: {reasons.get(method) or nearest(method, known)}")
    published = [name for row in PAPER for name in row.presets]
    place = {name: number for number, name in reversed(list(enumerate(published)))}
    ordered = sorted(fitting, key=lambda name: (place.get(name, len(published)), name))
    return [name for name in ordered if chosen is None or name in chosen], reasons


def specs_of(configs: Path, method: str) -> dict[str, Any]:
    """The methods of a preset with the sizes of Vim-S."""
    return read_preset(configs / "method" / f"{method}.yaml").methods_on(None)


def jobs_of_stage(
    stage: str, benchmark: Benchmark, settings: Mapping[str, Sequence[Setting]] | None = None
) -> list[Job]:
    """The runs of a stage; the first seed of everything comes first.

    Args:
        settings: for the stages `refine` and `tuned`, those of each method; methods without any are left out.
    Raises: UserError, and Hydra's exceptions for mistakes in the overrides.
    """
    if stage == "search":
        return _searched(benchmark, {name: [Setting(rate) for rate in benchmark.rates] for name in benchmark.methods})
    if stage == "refine":
        return _searched(benchmark, settings or {})
    chosen = {name: [Setting()] for name in benchmark.methods} if stage == "recipe" else settings or {}
    wanted = [Wanted(name, one, benchmark.tasks) for name in benchmark.methods for one in chosen.get(name, ())]
    return plan_runs(benchmark, wanted, benchmark.seeds)


def _searched(benchmark: Benchmark, settings: Mapping[str, Sequence[Setting]]) -> list[Job]:
    """Trials on val200, the first of each method before the second of any."""
    trials = zip_longest(*(settings.get(name, ()) for name in benchmark.methods))
    wanted = [
        Wanted(name, one, benchmark.search_tasks)
        for of_each in trials
        for name, one in zip(benchmark.methods, of_each)
        if one is not None
    ]
    return plan_runs(benchmark, wanted, benchmark.seeds[:1], SEARCH_SPLITS)


def plan_runs(
    benchmark: Benchmark, wanted: Sequence[Wanted], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Job]:
    """The runs that are wanted. Composes once a method and once a task, not once a run."""
    inputs, jobs = Inputs(), []
    given = [*benchmark.given, *overrides]
    composed = partial(compose, "train", configs=benchmark.configs)
    names = {name: None for want in wanted for name in want.tasks}
    tasks = {name: composed([f"dataset={name}", *given]) for name in names}
    changed = {(want.method, want.overrides): None for want in wanted}
    methods = {key: composed([f"method=[{key[0]}]", *given, *key[1]]) for key in changed}
    resolved = {name: Resolved(cfg) for name, cfg in tasks.items()}
    specs = {name: specs_of(benchmark.configs, name) for name, _ in methods}
    for want in wanted:
        cfg = copy.deepcopy(methods[want.method, want.overrides])
        cfg.sweep = "mini"
        changes = [*want.setting.changes(specs[want.method]), *_shorter_warmups(cfg)]
        cfg.merge_with_dotlist(changes)
        shared = Resolved(cfg)
        for task in want.tasks:
            common = [f"method=[{want.method}]", f"dataset={task}", *given, *want.overrides, *changes]
            for turn, seed in enumerate(seeds):
                plan = shared.plan(seed, resolved[task])
                label = " ".join([task, want.method, *want.overrides, str(want.setting), f"seed {seed}"])
                state = state_of(plan, inputs)
                sections = {"dataset": tasks[task].dataset}
                jobs.append(Job(label, [*common, f"seed={seed}"], cfg, plan, state, turn, sections))
    return list({job.folder: job for job in jobs}.values())


def _shorter_warmups(cfg: DictConfig) -> list[str]:
    """Overrides that keep the share of the run for which methods with a warm-up phase warm up."""
    images = {"train800": 800, "val200": 200}.get(cfg.dataset.train_split, 1000)
    steps = cfg.trainer.max_epochs * math.ceil(images / cfg.dataset.batch_size)
    return [
        f"method.{name}.warmup_steps={max(1, round(spec.warmup_steps * steps / PAPER_STEPS))}"
        for name, spec in cfg.method.items()
        if "warmup_steps" in spec
    ]
