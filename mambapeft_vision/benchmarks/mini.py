"""The runs of the mini benchmark (docs/benchmarks/mini.md): every preset that fits vim_nano on 13 small tasks."""

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from mambapeft_vision.adapter.presets import fitting_presets
from mambapeft_vision.data.generated.mini import IMPORTED
from mambapeft_vision.results.paper import PAPER
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables import Standard
from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.run.exit import nearest
from mambapeft_vision.run.inputs import Inputs
from mambapeft_vision.run.run_config import Resolved
from mambapeft_vision.sweep.jobs import Job, state_of
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.untrusted import read_yaml

STAGES = ("recipe", "search", "tuned")
TASKS = tuple(task.name for task in IMPORTED.values())
#: Like the paper's protocol, which tunes a method once, on five tasks, and not on every task.
SEARCH_TASKS = ("mini/usps", "mini/satellite_climate", "mini/scene_distance", "mini/norb_azimuth", "mini/dsprites_loc")
RECIPE_RATE = 1e-3
RATES = (3e-4, RECIPE_RATE, 3e-3, 1e-2, 3e-2)
SEARCH_SPLITS = ("dataset.train_split=train800", "dataset.test_split=val200")
#: Optimiser steps of a run of Vim-S on VTAB-1K, for which the presets' warm-up phases are set.
PAPER_STEPS = 100 * 32


@dataclass(frozen=True)
class Benchmark:
    """What is to be run. overrides: Hydra's, for every run."""

    configs: Path
    methods: Sequence[str]
    tasks: Sequence[str] = TASKS
    seeds: Sequence[int] = (0, 1, 2)
    rates: Sequence[float] = RATES
    search_tasks: Sequence[str] = SEARCH_TASKS
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Wanted:
    """Runs of one method with one learning rate, on some tasks."""

    method: str
    rate: float
    tasks: Sequence[str]


def benchmark_methods(configs: Path, chosen: Sequence[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """The presets that fit vim_nano in the order of the published table, and why the others do not.

    Args:
        chosen: names of those wanted; None: all.
    Raises: UserError for a chosen one that does not fit.
    """
    backbone = read_yaml(configs / "backbone" / "vim_nano.yaml", references=True)["name"]
    fitting, reasons = fitting_presets(configs / "method", backbone, of_vim_s=True)
    for name in chosen or ():
        if name not in fitting:
            raise UserError(f"{name} is no method for vim_nano: {reasons.get(name) or nearest(name, fitting)}")
    published = [name for row in PAPER for name in row.presets]
    place = {name: number for number, name in reversed(list(enumerate(published)))}
    ordered = sorted(fitting, key=lambda name: (place.get(name, len(published)), name))
    return [name for name in ordered if chosen is None or name in chosen], reasons


def jobs_of_stage(stage: str, benchmark: Benchmark, choice: Mapping[str, float] | None = None) -> list[Job]:
    """The runs of a stage; the first seed of everything comes first.

    Args:
        choice: for the stage `tuned`, each method's learning rate; methods without one are left out.
    Raises: UserError, and Hydra's exceptions for mistakes in the overrides.
    """
    if stage == "search":
        wanted = [
            Wanted(method, rate, benchmark.search_tasks) for rate in benchmark.rates for method in benchmark.methods
        ]
        return _plan(benchmark, wanted, benchmark.seeds[:1], SEARCH_SPLITS)
    rates = dict.fromkeys(benchmark.methods, RECIPE_RATE) if stage == "recipe" else choice or {}
    wanted = [Wanted(method, rates[method], benchmark.tasks) for method in benchmark.methods if method in rates]
    return _plan(benchmark, wanted, benchmark.seeds)


def _plan(
    benchmark: Benchmark, wanted: Sequence[Wanted], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Job]:
    """Composes once a method and once a task, not once a run."""
    register_schemas()
    inputs, jobs = Inputs(), []
    given = ["experiment=mini", *overrides, *benchmark.overrides]
    with initialize_config_dir(str(benchmark.configs), version_base="1.3"):
        names = {name: None for want in wanted for name in want.tasks}
        tasks = {name: compose("train", [f"dataset={name}", *given]) for name in names}
        methods = {name: compose("train", [f"method=[{name}]", *given]) for name in {w.method: None for w in wanted}}
    resolved = {name: Resolved(cfg) for name, cfg in tasks.items()}
    for want in wanted:
        cfg = copy.deepcopy(methods[want.method])
        cfg.sweep = "mini"
        changes = [f"trainer.learning_rate={want.rate}", *_shorter_warmups(cfg)]
        cfg.merge_with_dotlist(changes)
        shared = Resolved(cfg)
        for task in want.tasks:
            common = [f"method=[{want.method}]", f"dataset={task}", *given, *changes]
            for turn, seed in enumerate(seeds):
                plan = shared.plan(seed, resolved[task])
                label = f"{task} {want.method} lr {want.rate:g} seed {seed}"
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


# The choice of learning rates


@dataclass(frozen=True)
class Choice:
    """Mean accuracy in percent on val200 by learning rate, of the rates with all search tasks done."""

    means: Mapping[float, float]

    @property
    def rate(self) -> float:
        """The best one; of equally good ones the smallest."""
        return max(self.means, key=lambda rate: (self.means[rate], -rate))

    @property
    def at_edge(self) -> bool:
        """Whether a rate outside the grid might be better still."""
        return self.rate in (min(self.means), max(self.means))


def choices(
    records: Sequence[RunRecord], standard: Standard, tasks: Sequence[str] = SEARCH_TASKS, rates: int = len(RATES)
) -> dict[str, Choice]:
    """The learning rate of every preset whose search is done: `rates` rates, each on all of `tasks`.

    Args:
        records: of runs; those not scored on val200 do not count.
    """
    found: dict[str, dict[float, dict[str, float]]] = {}
    for record in records:
        if record.config["dataset"]["test_split"] == "val200" and record.task in tasks:
            preset, _ = standard.describe(record.config)
            scores = found.setdefault(preset, {}).setdefault(record.config["trainer"]["learning_rate"], {})
            scores[record.task] = 100 * record.accuracy
    complete = {
        preset: {rate: statistics.fmean(scores.values()) for rate, scores in of.items() if len(scores) == len(tasks)}
        for preset, of in found.items()
    }
    return {preset: Choice(dict(sorted(means.items()))) for preset, means in complete.items() if len(means) >= rates}
