"""metrics.csv: the measurements of each epoch of a run."""

import csv
import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mambapeft_vision.results.files import MOST_BYTES
from mambapeft_vision.results.layout import METRICS_FILE
from mambapeft_vision.results.record import check_recorded
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.untrusted import read_lines

_MOST_ROWS, _MOST_LINE_BYTES, _MOST_NUMBERS = 100_000, 10_000, 2_000_000


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv in a run's folder, one an epoch: `epoch` (from 0), `loss`, `accuracy` (0 to 1), ….

    Raises: UserError where the file is missing, is no table of finite numbers with an epoch in each line, or is not
        the one that a finished run wrote.
    """
    file = folder / METRICS_FILE
    lines = read_lines(file, max_bytes=MOST_BYTES, max_lines=_MOST_ROWS, max_line_bytes=_MOST_LINE_BYTES)
    digest = hashlib.sha256()
    reader = csv.DictReader(_hashed(lines, digest))
    rows: list[dict[str, float]] = []
    try:
        for row in reader:
            rows.append({str(name): float(value) for name, value in row.items()})
            if len(rows) * len(row) > _MOST_NUMBERS:
                raise UserError(f"{file}: expected at most {_MOST_NUMBERS:,} numbers. Run again with resume=false")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); expected the folder of a run") from error
    except (csv.Error, TypeError, ValueError) as error:
        raise UserError(f"{file}: {plain(error)}; expected a table of numbers. Run again with resume=false") from error
    check_recorded(folder, METRICS_FILE, digest.hexdigest())
    if any("epoch" not in row or not all(map(math.isfinite, row.values())) for row in rows):
        raise UserError(f"{file}: expected finite numbers and an epoch in every line. Run again with resume=false")
    return rows


def _hashed(lines: Iterable[str], digest: Any) -> Iterator[str]:
    """The lines, which the digest takes as they pass."""
    for line in lines:
        digest.update(line.encode())
        yield line
