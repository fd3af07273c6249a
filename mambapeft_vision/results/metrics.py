"""metrics.csv: the measurements of each epoch of a run."""

import csv
import io
import math
from pathlib import Path

from mambapeft_vision.results.files import read_text
from mambapeft_vision.results.layout import METRICS_FILE
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain

_MOST_ROWS, _MOST_COLUMNS = 100_000, 100


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv in a run's folder, one an epoch: `epoch` (from 0), `loss`, `accuracy` (0 to 1), ….

    Raises: UserError where the file is missing or is no table of finite numbers with an epoch in each line.
    """
    file = folder / METRICS_FILE
    text = read_text(file, "the folder of a run")
    columns = text.partition("\n")[0].count(",") + 1
    if text.count("\n") > _MOST_ROWS or text.count("\r") > _MOST_ROWS or columns > _MOST_COLUMNS:
        raise UserError(
            f"{file}: expected at most {_MOST_ROWS:,} lines of {_MOST_COLUMNS} numbers. Run again with resume=false"
        )
    reader = csv.DictReader(io.StringIO(text))
    try:
        rows = [{str(name): float(value) for name, value in row.items()} for row in reader]
    except (csv.Error, TypeError, ValueError) as error:
        raise UserError(f"{file}: {plain(error)}; expected a table of numbers. Run again with resume=false") from error
    if any("epoch" not in row or not all(map(math.isfinite, row.values())) for row in rows):
        raise UserError(f"{file}: expected finite numbers and an epoch in every line. Run again with resume=false")
    return rows
