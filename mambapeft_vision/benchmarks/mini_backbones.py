"""The mini benchmark over several backbones: every method on each, and whether they come in the same order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from scipy.stats import rankdata, spearmanr

from mambapeft_vision.benchmarks.mini_document import stages_of
from mambapeft_vision.results.paper import VIM_S, paper_row
from mambapeft_vision.results.plots import COLOURS, figure_text, save
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables import MISSING, Row, Score, Standard, Table, collect, to_markdown
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError

PUBLISHED = "Vim-S, published"
STAGES = {"tuned": "settings chosen on val200", "recipe": "the paper's recipe"}
FEWEST = 3  # methods that an order needs


@dataclass(frozen=True)
class Column:
    """One backbone's averages over all tasks. means: percent by preset; ppt: PPT by preset, of this project's runs."""

    name: str
    means: Mapping[str, Score]
    ppt: Mapping[str, float]

    def ranks(self, methods: Sequence[str]) -> dict[str, float]:
        """1 is the best; equal means share a rank."""
        return dict(zip(methods, rankdata([-self.means[name].mean for name in methods]).tolist()))


def columns_of(records: Iterable[RunRecord], standard: Standard) -> dict[str, list[Column]]:
    """For each of `STAGES` that every backbone has all runs of, a column for each backbone.

    Raises: UserError where no run is one of the benchmark's.
    """
    by_backbone: dict[str, list[RunRecord]] = {}
    for record in records:
        by_backbone.setdefault(record.backbone, []).append(record)
    stages = {name: stages_of(of, standard) for name, of in by_backbone.items()}
    found = {name: of for name, of in stages.items() if of.recipe}
    if not found:
        raise UserError("none of the runs is one of the mini benchmark's recipe; run mambapeft mini recipe")
    recipe = {"recipe": [_column(name, of.recipe, standard) for name, of in found.items()]}
    if not all(of.tuned and not of.missing for of in found.values()):
        return recipe
    return {"tuned": [_column(name, of.tuned, standard) for name, of in found.items()], **recipe}


def _column(name: str, records: Sequence[RunRecord], standard: Standard) -> Column:
    """The best-filled collection counts: a backbone with other weights is another one."""
    collections = collect(records, standard)
    collection = max(collections, key=lambda one: sum(len(row.records) for row in one.rows))
    averages: dict[str, tuple[Row, Score]] = {}
    for row in collection.rows:
        average = row.average([collection.tasks])
        if isinstance(average, Score):
            averages.setdefault(row.preset, (row, average))
    ppt = {preset: row.ppt(average) or 0.0 for preset, (row, average) in averages.items()}
    return Column(name, {preset: average for preset, (_, average) in averages.items()}, ppt)


def published_column(methods: Iterable[str]) -> Column:
    """The averages that the MambaPEFT paper has of Vim-S on VTAB-1K."""
    rows = {name: paper_row(name, VIM_S) for name in methods}
    found = {name: Score(row.average, None, ()) for name, row in rows.items() if row and name == row.presets[0]}
    return Column(PUBLISHED, found, {})


def averages_table(columns: Sequence[Column], stage: str) -> Table:
    """Every method: its average and PPT on each backbone, the published average, the best mean rank first."""
    methods = list(dict.fromkeys(name for column in columns for name in column.means))
    common = [name for name in methods if all(name in column.means for column in columns)]
    ranks = [column.ranks(common) for column in columns]
    mean_rank = {name: fmean(of[name] for of in ranks) for name in common}
    ordered = sorted(methods, key=lambda name: (mean_rank.get(name, len(methods) + 1), name))
    published = published_column(methods)
    rows = [
        [
            name,
            f"{mean_rank[name]:.1f}" if name in mean_rank else MISSING,
            *(cell for column in columns for cell in _cells(column, name)),
            _text(published.means.get(name)),
        ]
        for name in ordered
    ]
    header = ["Method", "mean rank", *(text for column in columns for text in (column.name, "PPT")), PUBLISHED]
    notes = [
        f"Average top-1 accuracy in percent with {stage}; ± sample standard deviation over seeds.",
        f"Mean rank: over the backbones, among the {len(common)} methods that all of them have.",
    ]
    return Table("Every method on every backbone", header, rows, notes)


def _cells(column: Column, name: str) -> tuple[str, str]:
    return _text(column.means.get(name)), f"{column.ppt[name]:.3f}" if name in column.ppt else MISSING


def _text(score: Score | None) -> str:
    if score is None:
        return MISSING
    return f"{score.mean:.2f}" if score.std is None else f"{score.mean:.2f} ± {score.std:.2f}"


def correlations_table(columns: Sequence[Column]) -> Table:
    """Spearman's rank correlation of the methods' averages between every two backbones and with the published ones."""
    every = [*columns, published_column(name for column in columns for name in column.means)]
    rows = [[first.name, *(_correlation(first, second) for second in every)] for first in every]
    notes = ["Spearman's rank correlation over the methods that both have; their number is in brackets."]
    return Table("Do the methods come in the same order?", ["", *(column.name for column in every)], rows, notes)


def _correlation(first: Column, second: Column) -> str:
    common = [name for name in first.means if name in second.means]
    if first is second or len(common) < FEWEST:
        return MISSING
    values = ([of.means[name].mean for name in common] for of in (first, second))
    return f"{spearmanr(*values).statistic:.2f} ({len(common)})"


def ranks_picture(columns: Sequence[Column]) -> Figure | None:
    """A line a method from its published rank to its rank on each backbone; None where too few are common to all."""
    published = published_column(name for column in columns for name in column.means)
    every = [published, *columns]
    methods = [name for name in published.means if all(name in column.means for column in columns)]
    if len(methods) < FEWEST:
        return None
    ranks = [column.ranks(methods) for column in every]
    figure = Figure(figsize=(3.2 + 2.0 * len(every), 1.2 + 0.2 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for name in methods:
        moved = max(of[name] for of in ranks) - min(of[name] for of in ranks)
        colour, style = (COLOURS[1], "--") if moved > len(methods) / 3 else (COLOURS[0], "-")
        places = [of[name] for of in ranks]
        axes.plot(range(len(every)), places, color=colour, linestyle=style, marker="o", markersize=3, linewidth=1)
        axes.text(-0.08, ranks[0][name], figure_text(name), ha="right", va="center", fontsize=7, color=colour)
        axes.text(len(every) - 0.92, ranks[-1][name], figure_text(name), va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(every)), [figure_text(column.name) for column in every], fontsize=8)
    axes.set_xlim(-0.9, len(every) - 0.1)
    axes.set_ylim(len(methods) + 0.6, 0.4)
    axes.set_yticks([1, *range(5, len(methods) + 1, 5)])
    axes.set_ylabel("rank among the methods that all have")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title("dashed: moves by more than a third of the ranks", fontsize=8)
    return figure


def comparison(pictures: Path, records: Iterable[RunRecord], standard: Standard) -> str:
    """The comparison as Markdown; its pictures are written to `<pictures>-<stage>-ranks.png`."""
    parts = []
    for stage, columns in columns_of(records, standard).items():
        settings = STAGES[stage]
        parts += [f"## All backbones, with {settings}\n", to_markdown(correlations_table(columns))]
        figure = ranks_picture(columns)
        if figure is not None:
            path = pictures.with_name(f"{pictures.name}-{stage}-ranks.png")
            save(figure, path)
            parts.append(f"![ranks of the methods on each backbone, with {settings}]({path.name})\n")
        parts.append(to_markdown(averages_table(columns, settings)))
    return "\n".join(parts)


def write_comparison(path: Path, records: Iterable[RunRecord], standard: Standard) -> None:
    """Raises UserError where no run is one of the benchmark's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = comparison(path.with_suffix(""), records, standard)
    write_text(path, f"# The mini benchmark over several backbones\n\n{text}")
