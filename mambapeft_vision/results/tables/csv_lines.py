"""Every number of a collection, unrounded, for other programs."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from mambapeft_vision.results.tables.build import published_number
from mambapeft_vision.results.tables.collect import AVERAGE, GROUPS, Collection, Incomplete, Row
from mambapeft_vision.utils.text import csv_cell

CSV_COLUMNS = (
    "family", "backbone", "weights", "method", "preset", "trained", "column", "mean", "std", "seeds", "tasks_done",
    "tasks", "published", "difference", "ppt",
)  # fmt: skip


def to_csv(collections: Iterable[Collection]) -> str:
    """Tidy CSV: one line for each method and column (task or average), unrounded; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for collection in collections:
        columns = {**{task: [[task]] for task in collection.tasks}, **collection.columns()}
        for row in collection.rows:
            for name, groups in columns.items():
                line = _csv_line(collection, row, name, groups)
                writer.writerow({key: csv_cell(value) for key, value in line.items()})
    return text.getvalue()


def _csv_line(collection: Collection, row: Row, column: str, groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    total = sum(map(len, groups))
    line: dict[str, Any] = {
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
    published = published_number(collection.published(row), column) if has_published else None
    return {
        **line,
        "mean": cell.mean,
        "std": cell.std,
        "seeds": " ".join(map(str, cell.seeds)),
        "tasks_done": total,
        "published": published,
        "difference": None if published is None else cell.mean - published,
        "ppt": row.ppt(cell),
    }
