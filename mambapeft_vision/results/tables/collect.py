"""From the results of many runs to rows and collections that can be compared.

Accuracies are percent. A mean over seeds has the sample standard deviation (n - 1). "Avg" is the mean over the tasks,
as in the paper; "Groups" the mean of the three group means. No average is formed over tasks that are not all there.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mambapeft_vision.adapter.presets import Preset, read_presets
from mambapeft_vision.adapter.specs import in_old_words, under_new_names
from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.results.paper import PAPER, PUBLISHED, PaperRow, paper_row
from mambapeft_vision.results.record import DERIVED, RunRecord
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.identity import SAME_EXPERIMENT
from mambapeft_vision.utils.paths import weights_in_package
from mambapeft_vision.utils.untrusted import read_yaml

GROUPS = {
    group.capitalize(): tuple(task.name for task in TASKS.values() if task.group == group)
    for group in ("natural", "specialized", "structured")
}
AVERAGE, MEAN_OF_GROUPS = "Avg", "Groups"
PROTOCOL_KEYS = ("train_split", "test_split", "batch_size")  # in `dataset`; the rest follows from the task


@dataclass(frozen=True)
class Standard:
    """The standard settings that a run is compared with, so that a row's label says where they differ."""

    trainer: Mapping[str, Any]
    protocol: Mapping[str, Any]
    presets: Mapping[str, Preset]

    def describe(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The preset (or the names of the methods) of a run, and every setting that is not the preset's.

        A result that was made from finished runs has the way it was made as a setting: `ensemble`, `interpolation`.
        """
        derived = config.get(DERIVED)
        preset, settings = self._describe({**config, "method": under_new_names(config["method"])})
        return preset, settings | ({} if derived is None else {derived["kind"]: derived["label"]})

    def _describe(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        names = sorted(config["method"])
        rivals = [preset for preset in self.presets.values() if sorted(preset.specs) == names]
        if not rivals:
            parts = [self.presets[name] for name in names if name in self.presets]
            return "+".join(names), self._differences(config, parts)
        found = {preset.name: self._differences(config, [preset]) for preset in rivals}
        best = min(found, key=lambda name: (len(found[name]), name))
        return best, found[best]

    def _differences(self, config: Mapping[str, Any], parts: Sequence[Preset]) -> dict[str, Any]:
        sized = config.get("method_sizes", "given") == "given"
        backbone = config["backbone"].get("name") if sized else None
        expected = {"trainer": dict(self.trainer), "method": {}, **self.protocol}
        for preset in parts:
            expected["method"] |= preset.methods_on(backbone)
            expected["trainer"] |= preset.overrides.get("trainer", {})
        given = {"trainer": config["trainer"], "method": config["method"]}
        given |= {key: config["dataset"][key] for key in PROTOCOL_KEYS if key in config["dataset"]}
        if config.get("method_sizes", "given") != "given":
            given["method_sizes"] = config["method_sizes"]
        expected, given = ({**tree, "method": in_old_words(tree["method"])} for tree in (expected, given))
        expected, given = _flat(expected), _flat(given)
        return {
            key.removeprefix("method.").removeprefix("trainer."): given.get(key, "default")
            for key in sorted(given.keys() | expected.keys())
            if key not in SAME_EXPERIMENT and (key not in given or key not in expected or given[key] != expected[key])
        }


def read_standard(configs: Path) -> Standard:
    """The standard settings, from the folder `configs`."""
    dataset = read_yaml(configs / "dataset" / "folder.yaml", references=True)
    return Standard(
        trainer=read_yaml(configs / "trainer" / "default.yaml"),
        protocol={key: dataset[key] for key in PROTOCOL_KEYS},
        presets=read_presets(configs / "method"),
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


# Numbers


@dataclass(frozen=True)
class Score:
    """Percent. std: None where one seed, or unequal seeds, give none. seeds: () where the tasks' seeds differ."""

    mean: float
    std: float | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Incomplete:
    """A cell without a number: how many tasks are done, and how many it needs."""

    done: int
    total: int


Cell = Score | Incomplete


@dataclass(frozen=True)
class Row:
    """All runs that differ in task and seed alone.

    Args:
        preset: name of the preset, or the joined names of the methods.
        settings: where the runs differ from the preset.
        records: the runs by task and seed.
    """

    preset: str
    settings: Mapping[str, Any]
    records: Mapping[tuple[str, int], RunRecord]

    @property
    def any_record(self) -> RunRecord:
        return next(iter(self.records.values()))

    @cached_property
    def percents(self) -> Mapping[str, Mapping[int, float]]:
        """Accuracy in percent by task, then by seed in ascending order."""
        found: dict[str, dict[int, float]] = {}
        for (task, seed), record in sorted(self.records.items(), key=lambda item: item[0]):
            found.setdefault(task, {})[seed] = 100 * record.accuracy
        return found

    def seeds(self, task: str) -> tuple[int, ...]:
        """The seeds with which a task was run, in ascending order."""
        return tuple(self.percents.get(task, ()))

    @cached_property
    def most_seeds(self) -> int:
        """The largest number of seeds of a task."""
        return max(map(len, self.percents.values()))

    def score(self, task: str) -> Cell:
        """The mean over a task's seeds."""
        return self.average([[task]])

    def average(self, groups: Sequence[Sequence[str]]) -> Cell:
        """The mean over groups of the mean over each group's tasks of the mean over seeds."""
        tasks = [task for group in groups for task in group]
        done = [self.percents[task] for task in tasks if task in self.percents]
        if len(done) < len(tasks):
            return Incomplete(len(done), len(tasks))
        mean = _mean_of_means(groups, lambda task: statistics.fmean(self.percents[task].values()))
        if len({tuple(of) for of in done}) > 1:
            return Score(mean, None, ())
        seeds = tuple(done[0])
        by_seed = [_mean_of_means(groups, partial(self._percent, seed=seed)) for seed in seeds]
        return Score(mean, statistics.stdev(by_seed) if len(seeds) > 1 else None, seeds)

    def ppt(self, cell: Cell) -> float | None:
        """Performance and parameters in one number, acc · exp(-log10(P / 10⁷ + 1)); None where there is no accuracy.

        acc is in [0, 1], P the trained parameters without the head. Source: V-PETL Bench (NeurIPS 2024).
        """
        if isinstance(cell, Incomplete):
            return None
        return cell.mean / 100 * math.exp(-math.log10(self.any_record.trainable / 1e7 + 1))

    def _percent(self, task: str, seed: int) -> float:
        return self.percents[task][seed]


def _mean_of_means(groups: Sequence[Sequence[str]], value: Callable[[str], float]) -> float:
    return statistics.fmean(statistics.fmean(map(value, group)) for group in groups)


# Rows


@dataclass(frozen=True)
class Collection:
    """Rows that can be compared: one family of tasks, one backbone, the same splits.

    shared: settings that all rows have; mixed: names what was mixed by permission, or "".
    """

    family: str
    backbone: str
    weights: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    shared: Mapping[str, Any]
    mixed: str

    @property
    def is_vtab(self) -> bool:
        return self.family == "vtab"

    @property
    def title(self) -> str:
        family = "VTAB-1K" if self.is_vtab else self.family
        split = f", on {self.shared['test_split']}" if "test_split" in self.shared else ""
        ours = self.weights == "official" and weights_in_package(self.backbone) is not None
        weights = "this project's" if ours else self.weights
        return f"{family}, {self.backbone} ({weights} weights){split}"

    @property
    def published_rows(self) -> tuple[PaperRow, ...]:
        """The published rows that ours can be compared with: same backbone, weights, tasks and settings."""
        if self.is_vtab and self.weights == "official" and not set(self.shared) - {"precision"}:
            return PUBLISHED.get(self.backbone, ())
        return ()

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The tasks of the groups that there are: natural, specialized, structured."""
        if self.is_vtab:
            return GROUPS
        group_of = {r.task: r.group.capitalize() for row in self.rows for r in row.records.values()}
        found = {group: tuple(task for task in self.tasks if group_of[task] == group) for group in GROUPS}
        return {group: tasks for group, tasks in found.items() if tasks}

    def columns(self) -> dict[str, Sequence[Sequence[str]]]:
        """The averages, by name, each with the groups of tasks that it is over."""
        if len(self.groups) < 2:
            return {AVERAGE: [self.tasks]}
        groups = self.groups
        return {**{g: [t] for g, t in groups.items()}, AVERAGE: [self.tasks], MEAN_OF_GROUPS: list(groups.values())}

    def label(self, row: Row) -> str:
        """A row's name in tables: the preset and its changed settings."""
        names = {"learning_rate": "lr"}
        own = [f"{names.get(key, key)}={value}" for key, value in row.settings.items() if key not in self.shared]
        return f"{row.preset} ({', '.join(own)})" if own else row.preset

    def published(self, row: Row) -> PaperRow | None:
        """The published row that this row repeats: the preset with nothing changed but the precision; else None."""
        if not self.published_rows or set(row.settings) - {"precision"}:
            return None
        return paper_row(row.preset, self.backbone)


def collect(records: Iterable[RunRecord], standard: Standard, *, allow_mixed: bool = False) -> list[Collection]:
    """Sorts runs into rows and rows into collections.

    Raises: UserError when runs of one collection were made from different images or weights, unless `allow_mixed`.
    """
    sorted_in: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        backbone = {k: v for k, v in record.config["backbone"].items() if k != "_target_"}
        splits = [record.config["dataset"][key] for key in ("train_split", "test_split")]
        key = (record.task.partition("/")[0], json.dumps([backbone, splits], sort_keys=True))
        sorted_in.setdefault(key, []).append(record)
    return [_collection(family, runs, standard, allow_mixed) for (family, _), runs in sorted(sorted_in.items())]


def _collection(family: str, records: list[RunRecord], standard: Standard, allow_mixed: bool) -> Collection:
    mixed = _mixed(records)
    if mixed and not allow_mixed:
        raise UserError(
            f"{mixed}. Such results are not comparable: collect one kind at a time, or give --allow-mixed to have them "
            f"in one table"
        )
    rows = _rows(records, standard)
    tasks = tuple(task.name for task in TASKS.values()) if family == "vtab" else _tasks_of(records)
    common = set.intersection(*(set(map(repr, row.settings.items())) for row in rows))
    shared = {key: value for key, value in rows[0].settings.items() if repr((key, value)) in common}
    weights = str(records[0].config["backbone"].get("weights"))
    return Collection(family, records[0].backbone, weights, tasks, tuple(rows), shared, mixed)


def _tasks_of(records: list[RunRecord]) -> tuple[str, ...]:
    """Tasks by group, in VTAB-1K's order, then by name."""
    order = [group.lower() for group in GROUPS]
    found = {(order.index(r.group) if r.group in order else len(order), r.task) for r in records}
    return tuple(task for _, task in sorted(found))


def _mixed(records: list[RunRecord]) -> str:
    manifests: dict[str, dict[str, str]] = {}
    weights: dict[str, str] = {}
    for record in records:
        who = f"{'+'.join(record.methods)} seed {record.seed}"
        manifests.setdefault(record.task, {}).setdefault(record.data_manifest, who)
        weights.setdefault(record.backbone_sha256, f"{who} on {record.task}")
    found = [
        f"{task} was run on different images ({_listed(kinds)})" for task, kinds in manifests.items() if len(kinds) > 1
    ]
    if len(weights) > 1:
        found.append(f"{records[0].backbone} had different weights ({_listed(weights)})")
    return "; ".join(found)


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{value.removeprefix('unverified:')[:12]}… in {who}" for value, who in kinds.items())


def _rows(records: list[RunRecord], standard: Standard) -> list[Row]:
    rows: dict[tuple[str, str], tuple[Mapping[str, Any], dict[tuple[str, int], RunRecord]]] = {}
    for record in sorted(records, key=lambda r: r.finished_at):  # if a run is there twice, the newer one stays
        preset, settings = standard.describe(record.config)
        key = (preset, json.dumps(settings, sort_keys=True, default=str))
        _, runs = rows.setdefault(key, (settings, {}))
        runs[record.task, record.seed] = record
    place = {name: number for number, row in reversed(list(enumerate(PAPER))) for name in row.presets}
    found = [Row(preset, settings, runs) for (preset, _), (settings, runs) in rows.items()]
    return sorted(found, key=partial(_place, place))


def _place(published: Mapping[str, int], row: Row) -> tuple[Any, ...]:
    """A sort key: the paper's order; rows of one preset with the fewest changed settings first."""
    place = published.get(row.preset, len(published))
    return place, row.preset, len(row.settings), str(row.settings)
