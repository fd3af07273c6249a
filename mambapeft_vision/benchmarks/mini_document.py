"""The mini benchmark's document: generated text stands between two marks, text written by hand around them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from mambapeft_vision.benchmarks.mini_memba import memba_table
from mambapeft_vision.benchmarks.mini_settings import SEARCH_TASKS, Choice, Setting, choices, setting_of
from mambapeft_vision.results.compare import Paired, holm, paired
from mambapeft_vision.results.paper import paper_row
from mambapeft_vision.results.plots import accuracy_against_parameters, differences, group_bars, save
from mambapeft_vision.results.record import DERIVED, RunRecord, is_derived, members_of
from mambapeft_vision.results.tables import (
    MISSING,
    Collection,
    Row,
    Score,
    Standard,
    Table,
    collect,
    summary_table,
    task_table,
    to_markdown,
)
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import markdown

BEGIN, END = "<!-- made by mambapeft mini document: begin -->", "<!-- end -->"
AGAINST = "lora_p_x"
HAND_WRITTEN = f"""\
# The mini benchmark

{BEGIN}
{END}
"""


def write_document(path: Path, records: Sequence[RunRecord], standard: Standard) -> None:
    """Writes what the runs give into the document (made where there is none), and its pictures beside it.

    Raises: UserError where the document lacks the marks, or no run is one of the benchmark's.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else HAND_WRITTEN
    parts = re.fullmatch(f"(.*{re.escape(BEGIN)}\n).*?({re.escape(END)}.*)", text, flags=re.DOTALL)
    if parts is None:
        raise UserError(f"{path} lacks the lines {BEGIN} and {END}, between which the tables go")
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join(_sections(path.with_suffix(""), records, standard))
    write_text(path, f"{parts[1]}\n{body}\n{parts[2]}")


def _sections(pictures: Path, records: Sequence[RunRecord], standard: Standard) -> Iterable[str]:
    stages = stages_of(records, standard)
    if not stages.recipe:
        raise UserError("none of the runs is one of the mini benchmark's recipe; run mambapeft mini recipe")
    yield "## The paper's recipe\n"
    yield from _tables(f"{pictures}-recipe", collect(stages.recipe, standard))
    if stages.choices:
        yield "## Settings chosen on val200\n"
        if stages.missing:
            yield f"{stages.missing:,} of these runs are left; a method is listed once all of its are done.\n"
        if stages.tuned:
            beside = [r for r in records if is_derived(r) and r.config["dataset"]["test_split"] == "test"]
            found = [_by_method(one, standard) for one in collect([*stages.tuned, *beside], standard)]
            yield from _tables(f"{pictures}-tuned", found)
            yield from _members(found, stages.tuned, standard)
        yield to_markdown(_choices_table(stages.choices))
        if any(choice.refined for choice in stages.choices.values()):
            yield to_markdown(_refinements_table(stages.choices))
    memba = memba_table(records, standard, SEARCH_TASKS)
    if len(memba.rows) > 1:
        yield f"## Memba\n\n{to_markdown(memba)}"
    yield f"## Runs\n\n{_provenance(records)}"


@dataclass(frozen=True)
class Stages:
    """What the runs of one backbone show.

    Args:
        recipe: the tested runs at the paper's settings.
        tuned: those at the chosen setting, of the methods with none missing.
        choices: the search's outcome by method.
        missing: runs at a chosen setting that are still to be done where the recipe's are.
    """

    recipe: Sequence[RunRecord]
    tuned: Sequence[RunRecord]
    choices: Mapping[str, Choice]
    missing: int


def stages_of(records: Sequence[RunRecord], standard: Standard) -> Stages:
    trials = [
        (record, trial)
        for record in records
        if record.task.startswith("mini/") and record.config["dataset"]["test_split"] == "test"
        for trial in [setting_of(record, standard)]
        if trial is not None
    ]
    found = choices(records, standard)
    recipe = [(name, record) for record, (name, setting) in trials if setting == Setting()]
    tuned = [(name, record) for record, (name, setting) in trials if name in found and setting == found[name].setting]
    left = {_place(*run) for run in recipe if run[0] in found} - {_place(*run) for run in tuned}
    unfinished = {name for name, *_ in left}
    shown = [record for name, record in tuned if name not in unfinished]
    return Stages([record for _, record in recipe], shown, found, len(left))


def _place(method: str, record: RunRecord) -> tuple[str, str, int]:
    return method, record.task, record.seed


def _by_method(collection: Collection, standard: Standard) -> Collection:
    """Rows under their method's name alone, since its setting stands in a table of its own.

    An ensemble of several methods has its label for a name and comes last. Ensembles and interpolations that are not
    made on every task with the same seeds are left out, as methods are whose runs are not all done.
    """
    rows, mixed = [], []
    for row in collection.rows:
        made = row.any_record.config.get(DERIVED)
        if made is None:
            rows.append(replace(row, settings={}))
            continue
        average = row.average([collection.tasks])
        if not isinstance(average, Score) or not average.seeds:
            continue
        if row.preset in standard.presets:
            rows.append(replace(row, settings={made["kind"]: made["label"]}))
        else:
            mixed.append(replace(row, preset=made["label"], settings={}))
    return replace(collection, rows=(*rows, *mixed))


def _members(collections: Sequence[Collection], records: Sequence[RunRecord], standard: Standard) -> Iterable[str]:
    """Which methods an ensemble of several has."""
    name_of = {record.fingerprint: standard.describe(record.config)[0] for record in records}
    for row in (row for collection in collections for row in collection.rows):
        if not _is_trained(row) and not row.settings:
            members = {name_of[one] for r in row.records.values() for one in members_of(r) if one in name_of}
            yield f"{markdown(row.preset)}: an ensemble of {', '.join(sorted(members))}, with one seed each.\n"


def _tables(pictures: str, collections: Sequence[Collection]) -> Iterable[str]:
    for collection in collections:
        yield to_markdown(summary_table(collection))
        scatter = accuracy_against_parameters(collection)
        if scatter is not None:
            yield _picture(scatter, f"{pictures}-parameters.png", "average accuracy against trained parameters")
            yield _picture(group_bars(collection), f"{pictures}-groups.png", "group means of every method")
        yield from _compared(collection, pictures)
        yield from _ordered_as_published(collection)
        yield to_markdown(task_table(collection))


def _compared(collection: Collection, pictures: str) -> Iterable[str]:
    base = next((row for row in collection.rows if row.preset == AGAINST and _is_trained(row)), None)
    compared = compare_with(base, collection) if base is not None else []
    if base is not None and compared:
        yield to_markdown(paired_table(collection, base, compared))
        drawn = [(collection.label(row), pair.mean, pair.half, holds) for row, pair, holds in compared]
        figure = differences(drawn, collection.label(base))
        yield _picture(figure, f"{pictures}-differences.png", f"differences from {AGAINST}, with intervals")


def _ordered_as_published(collection: Collection) -> Iterable[str]:
    ours, published = [], []
    for row in collection.rows:
        paper, average = paper_row(row.preset), row.average([collection.tasks])
        if isinstance(average, Score) and paper and row.preset == paper.presets[0] and _is_trained(row):
            ours.append(average.mean)
            published.append(paper.average)
    if len(ours) > 2:
        rho = spearmanr(ours, published).statistic
        yield (
            f"The order of the {len(ours)} methods that the MambaPEFT paper's table has too, against their order there "
            f"(Vim-S on VTAB-1K): Spearman's rank correlation is {rho:.2f}.\n"
        )


def _is_trained(row: Row) -> bool:
    """Whether a row holds runs; ensembles and interpolations have rows beside them."""
    return not is_derived(row.any_record)


def compare_with(base: Row, collection: Collection) -> list[tuple[Row, Paired, bool]]:
    """Every other row that has runs in common with `base` on every task, and whether the difference holds (Holm)."""
    rows = [row for row in collection.rows if row is not base]
    pairs = [(row, pair) for row in rows if (pair := paired(row, base, collection.tasks)) is not None]
    return [(row, pair, holds) for (row, pair), holds in zip(pairs, holm([pair.p for _, pair in pairs]))]


def paired_table(collection: Collection, base: Row, compared: Sequence[tuple[Row, Paired, bool]]) -> Table:
    """The largest difference first."""
    rows = []
    for row, pair, holds in sorted(compared, key=lambda item: -item[1].mean):
        interval = MISSING if pair.half is None else f"{pair.mean - pair.half:+.2f} to {pair.mean + pair.half:+.2f}"
        verdict = MISSING if pair.half is None else "yes" if holds else "alone" if pair.exceeds_noise else "no"
        deviation = MISSING if pair.seed_std is None else f"{pair.seed_std:.2f}"
        rows.append(
            [collection.label(row), f"{pair.mean:+.2f}", interval, deviation, f"{pair.won:g}/{pair.tasks}", verdict]
        )
    notes = [
        f"Average accuracy minus that of {collection.label(base)}, in percent points, paired by task and seed; the "
        "interval is for the seeds' noise on these tasks (mambapeft_vision/results/compare.py says how).",
        "Beyond noise: yes holds for all comparisons of the table together (Holm, 95 %); alone: zero is outside "
        "this interval, but so it would be now and then in a table this long; no: seeds explain it.",
    ]
    header = ["Method", "difference", "95 % interval", "std over seeds", "tasks won", "beyond noise"]
    return Table(f"Compared with {collection.label(base)}", header, rows, notes)


def _choices_table(found: Mapping[str, Choice]) -> Table:
    rates = sorted({rate for choice in found.values() for rate in choice.rates})
    rows = [
        [
            name,
            f"{choice.setting.rate:g}" + (" *" if choice.at_edge else ""),
            *(f"{choice.means[Setting(rate)]:.2f}" if Setting(rate) in choice.means else MISSING for rate in rates),
        ]
        for name, choice in found.items()
    ]
    notes = [
        "Mean accuracy in percent on val200 of five tasks after training on train800, one seed; one rate a method.",
        "* at the edge of the grid: a rate outside it might be better.",
    ]
    return Table("chosen learning rates", ["Method", "chosen", *(f"{rate:g}" for rate in rates)], rows, notes)


def _refinements_table(found: Mapping[str, Choice]) -> Table:
    """The trials after the rates, equally many for each method, and the choice among all."""
    rows = []
    for name, choice in found.items():
        more = [setting for setting in choice.means if setting not in {Setting(rate) for rate in choice.rates}]
        if more:
            trials = "; ".join(f"{setting}: {choice.means[setting]:.2f}" for setting in more)
            rows.append([name, str(choice.setting), f"{choice.mean:.2f}", trials])
    notes = ["Around each method's best rate, scored like the rates: two weight decays, and two scales or rates."]
    return Table("chosen settings", ["Method", "chosen", "val200", "tried"], rows, notes, left=(0, 1, 3))


def _provenance(records: Sequence[RunRecord]) -> str:
    def listed(values: Iterable[object]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    runs = [record for record in records if not is_derived(record)]
    hours = sum(record.wall_seconds for record in runs) / 3600
    facts = {
        "PyTorch": (r.versions.get("torch", "?") for r in runs),
        "kernels": (r.kernel for r in runs),
        "precision": (r.precision for r in runs),
        "backbone sha256": (r.backbone_sha256[:12] for r in runs),
        "commit": (r.git_commit for r in runs),
    }
    told = "; ".join(f"{name} {listed(values)}" for name, values in facts.items())
    devices = listed(record.device_name for record in runs)
    return f"{len(runs):,} runs on {devices}, {hours:.1f} hours if they were made one after another; {told}.\n"


def _picture(figure: Figure, path: str, text: str) -> str:
    save(figure, path)
    return f"![{text}]({Path(path).name})\n"
