"""Tables of many runs: from result.json files to Markdown, CSV and LaTeX, ours beside the published numbers.

Accuracies are percent. A mean over seeds has the sample standard deviation (n - 1). "Avg" is the mean over the tasks,
as in the paper; "Groups" the mean of the three group means. No average is formed over tasks that are not all there.
"""

import csv
import io
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mambapeft_vision.adapter.presets import Preset, read_presets
from mambapeft_vision.adapter.specs import in_old_words, under_new_names
from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.results.bundle import SUFFIX, read_bundle
from mambapeft_vision.results.paper import PAPER, PaperRow, paper_row
from mambapeft_vision.results.record import RESULT_FILE, RunRecord, read_record
from mambapeft_vision.utils.errors import UserError

GROUPS = {
    group.capitalize(): tuple(task.name for task in TASKS.values() if task.group == group)
    for group in ("natural", "specialized", "structured")
}
AVERAGE, MEAN_OF_GROUPS = "Avg", "Groups"
PUBLISHED_BACKBONES = {"vim_small_patch16_224": "vim_s", "deit_small_patch16_224": "vit_s"}  # ours → paper.py's
PROTOCOL_KEYS = ("train_split", "test_split", "batch_size")  # of the dataset section; the rest follows from the task
MISSING = "–"
UNEQUAL_SEEDS = "†"


# Reading


def find_records(places: Iterable[str | Path]) -> list[RunRecord]:
    """Every finished run below `places`, and all runs of bundles (`*.runs.json`); runs set aside do not count.

    Raises: UserError for a place that does not exist, or a damaged file.
    """
    files, bundles = [], []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"{place} does not exist; expected a folder with finished runs, such as outputs")
        if place.is_file():
            (bundles if place.name.endswith(SUFFIX) else files).append(place)
        else:
            found = _files_below(place)
            files += [file for file in found if file.name == RESULT_FILE]
            bundles += [file for file in found if file.name.endswith(SUFFIX)]
    records = (_read_unless_gone(file) for file in files if ".replaced-" not in file.parent.name)
    return [record for record in records if record] + [record for file in bundles for record in read_bundle(file)]


def _files_below(place: Path) -> list[Path]:
    """Sorted. A folder that a sweep sets aside meanwhile is no error, as it is one to Path.rglob."""
    return sorted(Path(folder, name) for folder, _, names in os.walk(place) for name in names)


def _read_unless_gone(file: Path) -> RunRecord | None:
    try:
        return read_record(file)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # set aside since it was found
            return None
        raise


@dataclass(frozen=True)
class Standard:
    """What the settings of a run are compared with, so that a row's label says where they differ."""

    trainer: Mapping[str, Any]
    protocol: Mapping[str, Any]
    presets: Mapping[str, Preset]

    def describe(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The preset (or the names of the methods) of a run, and every setting that is not the preset's."""
        config = {**config, "method": under_new_names(config["method"])}
        names = sorted(config["method"])
        rivals = [preset for preset in self.presets.values() if sorted(preset.methods) == names]
        if not rivals:
            parts = [self.presets[name] for name in names if name in self.presets]
            return "+".join(names), self._differences(config, parts)
        found = {preset.name: self._differences(config, [preset]) for preset in rivals}
        best = min(found, key=lambda name: (len(found[name]), name))
        return best, found[best]

    def _differences(self, config: Mapping[str, Any], parts: Sequence[Preset]) -> dict[str, Any]:
        sized = config.get("method_sizes", "given") == "given"
        backbone = config.get("backbone", {}).get("name") if sized else None
        expected = {"trainer": dict(self.trainer), "method": {}, **self.protocol}
        for preset in parts:
            expected["method"] |= preset.methods_on(backbone)
            expected["trainer"] |= preset.overrides.get("trainer", {})
        given = {"trainer": config["trainer"], "method": config["method"]}
        given |= {key: config["dataset"][key] for key in PROTOCOL_KEYS}
        if config.get("method_sizes", "given") != "given":
            given["method_sizes"] = config["method_sizes"]
        expected, given = ({**tree, "method": in_old_words(tree["method"])} for tree in (expected, given))
        expected, given = _flat(expected), _flat(given)
        neutral = {"trainer.checkpoint_every_s", "trainer.picture", "trainer.device", "trainer.cuda_graph"}
        neutral |= {"trainer.on_nonfinite"}
        neutral |= {key for key in expected if key.startswith("trainer.") and key not in given}  # newer than the record
        return {
            key.removeprefix("method.").removeprefix("trainer."): given.get(key, "default")
            for key in sorted(given.keys() | expected.keys())
            if key not in neutral and (key not in given or key not in expected or given[key] != expected[key])
        }


def read_standard(configs: Path) -> Standard:
    """The standard settings, from the folder `configs`."""
    dataset = OmegaConf.load(configs / "dataset" / "folder.yaml")
    return Standard(
        trainer=OmegaConf.to_container(OmegaConf.load(configs / "trainer" / "default.yaml")),
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
    """Tasks done of those that the number needs; there is no number."""

    done: int
    total: int


Cell = Score | Incomplete


@dataclass(frozen=True)
class Row:
    """All runs that differ in task and seed alone. settings: where they differ from the preset."""

    preset: str
    settings: Mapping[str, Any]
    records: Mapping[tuple[str, int], RunRecord]  # by task and seed

    @property
    def any_record(self) -> RunRecord:
        return next(iter(self.records.values()))

    def seeds(self, task: str) -> tuple[int, ...]:
        return tuple(sorted(seed for name, seed in self.records if name == task))

    @cached_property
    def most_seeds(self) -> int:
        return max(len(self.seeds(task)) for task, _ in self.records)

    def score(self, task: str) -> Cell:
        return self.average([[task]])

    def average(self, groups: Sequence[Sequence[str]]) -> Cell:
        """The mean over groups of the mean over each group's tasks of the mean over seeds."""
        tasks = [task for group in groups for task in group]
        done = [task for task in tasks if self.seeds(task)]
        if len(done) < len(tasks):
            return Incomplete(len(done), len(tasks))
        mean = _mean_of_means(groups, lambda task: statistics.fmean(map(self._percent(task), self.seeds(task))))
        if len({self.seeds(task) for task in tasks}) > 1:
            return Score(mean, None, ())
        seeds = self.seeds(tasks[0])
        by_seed = [_mean_of_means(groups, lambda task, seed=seed: self._percent(task)(seed)) for seed in seeds]
        return Score(mean, statistics.stdev(by_seed) if len(seeds) > 1 else None, seeds)

    def _percent(self, task: str):
        return lambda seed: 100 * self.records[task, seed].accuracy


def _mean_of_means(groups: Sequence[Sequence[str]], value) -> float:
    return statistics.fmean(statistics.fmean(map(value, group)) for group in groups)


# Rows


@dataclass(frozen=True)
class Collection:
    """Rows that can be compared: one family of tasks, one backbone, the same splits.

    shared: settings that all rows have; mixed: what was mixed because it was allowed, or "".
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
        return f"{family}, {self.backbone} ({self.weights} weights){split}"

    @property
    def published_backbone(self) -> str | None:
        """Of the published numbers that ours can be compared with."""
        if self.is_vtab and self.weights == "official" and not set(self.shared) - {"precision"}:
            return PUBLISHED_BACKBONES.get(self.backbone)
        return None

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
        names = {"learning_rate": "lr"}
        own = [f"{names.get(key, key)}={value}" for key, value in row.settings.items() if key not in self.shared]
        return f"{row.preset} ({', '.join(own)})" if own else row.preset

    def published(self, row: Row) -> PaperRow | None:
        """The published row that this one repeats: the preset as it is, nothing changed but the precision."""
        if self.published_backbone is None or set(row.settings) - {"precision"}:
            return None
        return paper_row(row.preset, self.published_backbone)


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
            f"{mixed}. Such numbers are not comparable: collect one kind at a time, or say --allow-mixed to have them "
            f"in one table"
        )
    rows = _rows(records, standard)
    tasks = tuple(task.name for task in TASKS.values()) if family == "vtab" else _tasks_of(records)
    common = set.intersection(*(set(map(repr, row.settings.items())) for row in rows))
    shared = {key: value for key, value in rows[0].settings.items() if repr((key, value)) in common}
    weights = str(records[0].config["backbone"].get("weights"))
    return Collection(family, records[0].backbone, weights, tasks, tuple(rows), shared, mixed)


def _tasks_of(records: list[RunRecord]) -> tuple[str, ...]:
    """By group, in the order of VTAB-1K's, then by name."""
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
    rows: dict[tuple[str, str], Row] = {}
    for record in sorted(records, key=lambda r: r.finished_at):  # of the same run twice, the newer one stays
        preset, settings = standard.describe(record.config)
        key = (preset, json.dumps(settings, sort_keys=True, default=str))
        row = rows.setdefault(key, Row(preset, settings, {}))
        row.records[record.task, record.seed] = record
    order = [name for published in PAPER for name in published.presets]
    return sorted(rows.values(), key=partial(_place, order))


def _place(order: Sequence[str], row: Row) -> tuple[Any, ...]:
    """As in the paper; of one preset the row with the fewest changed settings first."""
    place = order.index(row.preset) if row.preset in order else len(order)
    return place, row.preset, len(row.settings), str(row.settings)


# Tables


@dataclass(frozen=True)
class Table:
    """Text cells. The first column is left-aligned, the others to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def tables_of(collection: Collection) -> list[Table]:
    """Summary, comparison with the published numbers (where there are any), and every task."""
    tables = [summary_table(collection)]
    if collection.published_backbone is not None:
        tables.append(comparison_table(collection))
    return [*tables, task_table(collection)]


def summary_table(collection: Collection) -> Table:
    columns = collection.columns()
    rows = [
        [collection.label(row), *_counts(row), *(cell_text(row, row.average(groups)) for groups in columns.values())]
        for row in collection.rows
    ]
    return _table(collection, "summary", ["Method", "Trained", "Head", *columns], rows)


def task_table(collection: Collection) -> Table:
    rows = [
        [
            collection.label(row),
            *(cell_text(row, row.score(task)) for task in collection.tasks),
            cell_text(row, row.average([collection.tasks])),
        ]
        for row in collection.rows
    ]
    header = ["Method", *(task.partition("/")[2] for task in collection.tasks), AVERAGE]
    return _table(collection, "tasks", header, rows)


def comparison_table(collection: Collection) -> Table:
    """Ours, published and the difference, for the group means and the average; published rows not run are listed."""
    columns = {**GROUPS, AVERAGE: collection.tasks}
    header = ["Method", "Trained (K)", "published", *(h for name in columns for h in (name, "published", "difference"))]
    rows, seen = [], set()
    for row in collection.rows:
        published = collection.published(row)
        seen.add(published and published.label)
        cells = [collection.label(row), _span(r.trainable / 1000 for r in row.records.values()), _thousands(published)]
        for name, tasks in columns.items():
            cells += _compared(row, row.average([tasks]), _published(published, name))
        rows.append(cells)
    for published in PAPER:
        if published.backbone == collection.published_backbone and published.label not in seen:
            numbers = (_published(published, name) for name in columns)
            cells = [MISSING if n is None else f"{n:.2f}" for n in numbers]
            rows.append(
                [published.label, MISSING, _thousands(published), *(c for n in cells for c in (MISSING, n, MISSING))]
            )
    return _table(collection, "beside the published numbers", header, rows)


def cell_text(row: Row, cell: Cell) -> str:
    """`71.52 ± 0.31`; seeds named where they are fewer than the row's most, or unequal; `7/19` for what is missing."""
    if isinstance(cell, Incomplete):
        return MISSING if cell.total == 1 else f"{cell.done}/{cell.total}"
    text = f"{cell.mean:.2f}" if cell.std is None else f"{cell.mean:.2f} ± {cell.std:.2f}"
    if not cell.seeds:
        return text + UNEQUAL_SEEDS
    return text if len(cell.seeds) == row.most_seeds else f"{text} (n={len(cell.seeds)})"


def _table(collection: Collection, what: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    text = "".join(cell for row in rows for cell in row)
    counts = sorted({row.most_seeds for row in collection.rows})
    seeds = (
        f"{counts[0]} seed{'s' if counts[0] > 1 else ''}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    )
    deviation = " ± sample standard deviation" if "±" in text else ""
    split = collection.rows[0].any_record.config["dataset"]["test_split"]
    notes = [f"Top-1 accuracy in percent on {split}; mean{deviation} over {seeds}."]
    if collection.shared:
        notes.append("All rows: " + ", ".join(f"{key}={value}" for key, value in collection.shared.items()) + ".")
    if UNEQUAL_SEEDS in text:
        notes.append(f"{UNEQUAL_SEEDS} the tasks have unequal seeds, so no deviation is given.")
    if re.search(r"\d/\d", text):
        notes.append("n/m: only n of the m tasks are done, so there is no average.")
    if collection.mixed:
        notes.append(f"Mixed, as allowed: {collection.mixed}.")
    return Table(f"{collection.title}: {what}", header, rows, notes)


def _counts(row: Row) -> tuple[str, str]:
    records = row.records.values()
    return _span(r.trainable for r in records), _span(r.head for r in records)


def _span(numbers: Iterable[float]) -> str:
    """`1,234`, or `770 to 152,845` where they differ, as heads of tasks do."""
    numbers = sorted(numbers)
    low, high = f"{numbers[0]:,.0f}", f"{numbers[-1]:,.0f}"
    return low if low == high else f"{low} to {high}"


def _thousands(published: PaperRow | None) -> str:
    return MISSING if published is None or published.count_k is None else f"{published.count_k:,}"


def _published(published: PaperRow | None, column: str) -> float | None:
    return None if published is None else getattr(published, "average" if column == AVERAGE else column.lower())


def _compared(row: Row, cell: Cell, published: float | None) -> tuple[str, str, str]:
    ours = cell_text(row, cell)
    if published is None:
        return ours, MISSING, MISSING
    difference = f"{cell.mean - published:+.2f}" if isinstance(cell, Score) else MISSING
    return ours, f"{published:.2f}", difference


# Text


def to_markdown(table: Table) -> str:
    widths = [max(len(line[i]) for line in (table.header, *table.rows)) for i in range(len(table.header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(aligned) + " |"

    rule = "| " + " | ".join("-" * (w - 1) + (":" if i else "-") for i, w in enumerate(widths)) + " |"
    parts = [f"### {table.title}", "", line(table.header), rule, *map(line, table.rows), ""]
    return "\n".join([*parts, *(f"{note}  " for note in table.notes), ""])


def to_latex(table: Table) -> str:
    """A tabular (no packages needed) with title and notes as comments."""
    comments = [f"% {text}" for text in (table.title, *table.notes)]
    lines = [" & ".join(map(_latex, cells)) + r" \\" for cells in (table.header, *table.rows)]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}"
    return "\n".join([*comments, begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}", ""])


def _latex(text: str) -> str:
    replaced = {"_": r"\_", "%": r"\%", "±": r"$\pm$", "–": "--", UNEQUAL_SEEDS: r"$\dagger$"}
    return "".join(replaced.get(character, character) for character in text)


CSV_COLUMNS = (
    "family", "backbone", "weights", "method", "preset", "trained", "column", "mean", "std", "seeds", "tasks_done",
    "tasks", "published", "difference",
)  # fmt: skip


def to_csv(collections: Iterable[Collection]) -> str:
    """Tidy: one line a method and column (task or average), unrounded; what is missing is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for collection in collections:
        columns = {**{task: [[task]] for task in collection.tasks}, **collection.columns()}
        for row in collection.rows:
            writer.writerows(_csv_line(collection, row, name, groups) for name, groups in columns.items())
    return text.getvalue()


def _csv_line(collection: Collection, row: Row, column: str, groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    total = sum(map(len, groups))
    line = {
        "family": collection.family,
        "backbone": collection.backbone,
        "weights": collection.weights,
        "method": collection.label(row),
        "preset": row.preset,
        "trained": row.any_record.trainable,
        "column": column,
        "tasks": total,
    }
    cell = row.average(groups)
    if isinstance(cell, Incomplete):
        return {**line, "tasks_done": cell.done}
    has_published = column in (*GROUPS, AVERAGE)
    published = _published(collection.published(row), column) if has_published else None
    return {
        **line,
        "mean": cell.mean,
        "std": cell.std,
        "seeds": " ".join(map(str, cell.seeds)),
        "tasks_done": total,
        "published": published,
        "difference": None if published is None else cell.mean - published,
    }
