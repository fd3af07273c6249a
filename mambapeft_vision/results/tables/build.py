"""The tables of a collection of runs: a summary, ours beside the published numbers, and every task."""

import re
from collections.abc import Iterable, Sequence

from mambapeft_vision.results.paper import PaperRow
from mambapeft_vision.results.tables.collect import AVERAGE, GROUPS, Cell, Collection, Incomplete, Row, Score
from mambapeft_vision.results.tables.render import Table

MISSING = "–"
UNEQUAL_SEEDS = "†"


def tables_of(collection: Collection) -> list[Table]:
    """Summary, comparison with the published numbers (where there are any), and every task."""
    tables = [summary_table(collection)]
    if collection.published_rows:
        tables.append(comparison_table(collection))
    return [*tables, task_table(collection)]


def summary_table(collection: Collection) -> Table:
    """A row for each method: parameters, and averages over groups of tasks."""
    columns = collection.columns()
    rows = [
        [
            collection.label(row),
            *_counts(row),
            *(cell_text(row, row.average(groups)) for groups in columns.values()),
            _ppt_text(row.ppt(row.average([collection.tasks]))),
        ]
        for row in collection.rows
    ]
    note = f"PPT: {AVERAGE} / 100 · exp(-log10(P / 10⁷ + 1)), P trained parameters without the head."
    return _table(collection, "summary", ["Method", "Trained", "Head", *columns, "PPT"], rows, [note])


def task_table(collection: Collection) -> Table:
    """A row for each method, a column for each task."""
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
            cells += _compared(row, row.average([tasks]), published_number(published, name))
        rows.append(cells)
    for published in collection.published_rows:
        if published.label not in seen:
            numbers = (published_number(published, name) for name in columns)
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


def _ppt_text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _table(
    collection: Collection,
    what: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    more_notes: Sequence[str] = (),
) -> Table:
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
    return Table(f"{collection.title}: {what}", header, rows, [*notes, *more_notes])


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


def published_number(published: PaperRow | None, column: str) -> float | None:
    """The published mean over a group of tasks, or over all of them."""
    return None if published is None else getattr(published, "average" if column == AVERAGE else column.lower())


def _compared(row: Row, cell: Cell, published: float | None) -> tuple[str, str, str]:
    ours = cell_text(row, cell)
    if published is None:
        return ours, MISSING, MISSING
    difference = f"{cell.mean - published:+.2f}" if isinstance(cell, Score) else MISSING
    return ours, f"{published:.2f}", difference
