"""A table of paths and labels: CSV, or Parquet where pyarrow or pandas is installed.

Columns are known by name: `path` (file, filename, image, image_path), `label` (labels, class, category, target) and
optionally `split` (set, subset). Two or three columns without a header are path, label and split. With several labels,
a cell holds them divided by `|` or `;`, or each class has a column of 0 and 1.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from mambapeft_vision.data.own.source import (
    Source,
    check_class_names,
    check_paths,
    look_alikes,
    named,
    natural_order,
    split_word,
)
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.typed import nearest
from mambapeft_vision.utils.untrusted import read_bytes

MAX_TABLE_BYTES = 400_000_000
MAX_ROWS = 2_000_000
MAX_CELLS = 20_000_000
MAX_LABELS = 500_000_000  # images x classes, each a float32
_ROWS_AT_ONCE = 1_000  # rows of Parquet, where a few bytes can stand for a long text
MAX_COLUMNS = 10_000
_NAMES = {
    "path": ("path", "file", "filename", "file_name", "image", "image_path", "filepath", "file_path"),
    "label": ("label", "labels", "class", "category", "target", "class_name"),
    "split": ("split", "set", "subset"),
}
_ENDINGS = {".csv": ",", ".tsv": "\t", ".txt": None}
PARQUET = ".parquet"


@dataclass(frozen=True)
class Columns:
    """Names of the columns; None: known by their usual names."""

    path: str | None = None
    label: str | None = None
    split: str | None = None


USUAL = Columns()


def is_table(path: Path) -> bool:
    """Whether a path is a table by its ending."""
    return path.suffix.lower() in (*_ENDINGS, PARQUET)


def read_table(file: Path, root: Path | None = None, columns: Columns = USUAL, several: bool = False) -> Source:
    """Reads a table of paths and labels.

    Args:
        root: folder that the paths are relative to; default: the table's folder. Absolute paths must lie in it.
        columns: their names, where they are not the usual ones.
        several: whether an image may have any number of labels.

    Raises: UserError naming the line (or row) and what is wrong with it.
    """
    root = file.parent if root is None else root
    header, rows = read_parquet(file) if file.suffix.lower() == PARQUET else _read_csv(file)
    places = _places(header, columns, file, several)
    if not rows:
        raise UserError(f"{file} has no rows; expected one for each image. Fill it.")
    paths = [_relative(row[places["path"]], root, f"{file}: row {number}") for number, row in enumerate(rows, 1)]
    _refuse_repeated(paths, file)
    check_paths(paths, file)
    texts, names = _labels(header, rows, places, file, several)
    check_class_names(names, file)
    if several:
        _refuse_more(len(rows) * len(names), MAX_LABELS, "labels (images x classes)", file)
    number = {name: label for label, name in enumerate(names)}
    return Source(
        root,
        tuple(paths),
        tuple(tuple(sorted({number[text] for text in of_image})) for of_image in texts),
        _splits(rows, places, file),
        tuple(names),
        tuple(look_alikes(names)),
    )


def _labels(
    header: list[str], rows: list[list[str]], places: Mapping[str, int], file: Path, several: bool
) -> tuple[list[list[str]], list[str]]:
    """The class names of each image, and all of them in order."""
    if "label" not in places:  # a column for each class
        columns = [i for i in range(len(header)) if i not in places.values()]
        for row_number, row in enumerate(rows, 1):
            for i in columns:
                if row[i] not in ("0", "1", "0.0", "1.0"):
                    raise UserError(
                        f"{file}: row {row_number}: {shown(header[i])} is {shown(row[i])}; expected 0 or 1 in the "
                        f"column of a class. Correct it, or name the column of labels (dataset.columns)."
                    )
        texts = [[header[i] for i in columns if row[i] in ("1", "1.0")] for row in rows]
        names = [header[i] for i in columns]
    else:
        cells = [row[places["label"]].strip() for row in rows]
        texts = [[t.strip() for t in re.split(r"[|;]", cell) if t.strip()] if several else [cell] for cell in cells]
        if not several and "" in cells:
            raise UserError(f"{file}: row {cells.index('') + 1} has no label. Fill it in, or remove the row.")
        names = natural_order({text for of_image in texts for text in of_image})
    if len(names) < 2:
        raise UserError(f"{file} has {len(names)} classes ({named(names)}); expected at least two.")
    return texts, names


def _splits(rows: list[list[str]], places: Mapping[str, int], file: Path) -> tuple[str, ...] | None:
    if "split" not in places:
        return None
    return tuple(split_word(row[places["split"]], f"{file}: row {number}") for number, row in enumerate(rows, 1))


def _relative(text: str, root: Path, where: str) -> str:
    path = PurePosixPath(text.strip())
    if path.is_absolute():
        try:
            path = path.relative_to(root.absolute())
        except ValueError:
            raise UserError(
                f"{where}: {shown(text)} is not below {root}. Give dataset.root=DIR, a folder above all images."
            ) from None
    if not text.strip() or ".." in path.parts or str(path) == ".":
        raise UserError(
            f"{where}: {shown(text)} is no path below {root}; expected one without '..'. Correct it, or give "
            f"dataset.root=DIR."
        )
    return str(path)


def _refuse_repeated(paths: Sequence[str], file: Path) -> None:
    rows: dict[str, int] = {}
    for number, path in enumerate(paths, 1):
        if path in rows:
            raise UserError(
                f"{file}: row {number}: {plain(path)} stands before, in row {rows[path]}. Remove one; an image with "
                f"several labels has one row (dataset.multi_label=true)."
            )
        rows[path] = number


def _places(header: list[str], columns: Columns, file: Path, several: bool) -> dict[str, int]:
    """Column → its place in a row."""
    places = {}
    lowered = [name.strip().lower() for name in header]
    for kind, usual in _NAMES.items():
        wanted = getattr(columns, kind)
        if wanted is not None:
            if wanted not in header:
                raise UserError(
                    f"{file} has no column {shown(wanted)} (dataset.columns, {kind}); {nearest(wanted, header)}"
                )
            places[kind] = header.index(wanted)
        elif found := [name for name in usual if name in lowered]:
            places[kind] = lowered.index(found[0])
    needed = ["path"] if several else ["path", "label"]
    missing = [kind for kind in needed if kind not in places]
    if missing:
        raise UserError(
            f"{file} has the columns {named(header)}; expected one for the {' and one for the '.join(missing)}. Rename"
            f" "
            f"them, or name them: 'dataset.columns={{{', '.join(f'{kind}: NAME' for kind in missing)}}}'."
        )
    return places


def _read_csv(file: Path) -> tuple[list[str], list[list[str]]]:
    try:
        text = read_bytes(file, max_bytes=MAX_TABLE_BYTES, follow_links=True).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}). Save it as CSV in UTF-8.") from None
    first = text.partition("\n")[0]
    delimiter = _ENDINGS.get(file.suffix.lower()) or max(",;\t", key=first.count)
    if delimiter == "," and "," not in first:
        delimiter = max(",;\t", key=first.count)
    _refuse_more(text.count(delimiter) + text.count("\n"), MAX_CELLS, "cells", file)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = list(islice((row for row in reader if row), MAX_ROWS + 2))  # the header, and one too many
    except csv.Error as error:
        raise UserError(f"{file} is no CSV ({plain(error)}). Save it again as CSV in UTF-8.") from None
    if not rows:
        raise UserError(f"{file} is empty; expected a header such as path,label and a row for each image. Fill it.")
    _refuse_more(len(rows) - 1, MAX_ROWS, "rows", file)
    header = rows[0]
    if len(header) > MAX_COLUMNS:
        raise UserError(f"{file} has {len(header):,} columns; expected at most {MAX_COLUMNS:,}. Remove some.")
    uneven = next((number for number, row in enumerate(rows, 1) if len(row) != len(header)), None)
    if uneven is not None:
        raise UserError(
            f"{file}: line {uneven} has {len(rows[uneven - 1])} cells; expected {len(header)}, as in the first one. "
            f"Correct it, and quote texts that hold {delimiter!r}."
        )
    if _has_no_header(header):
        return ["path", "label", "split"][: len(header)], rows
    return header, rows[1:]


def _has_no_header(first: list[str]) -> bool:
    """Whether the first row is an image already: two or three cells, of which the first has a file's ending."""
    return len(first) in (2, 3) and PurePosixPath(first[0].strip()).suffix != ""


def read_parquet(file: Path) -> tuple[list[str], list[list[str]]]:
    columns = _parquet_columns(file)
    header = list(columns)
    if len(header) > MAX_COLUMNS:
        raise UserError(f"{file} has {len(header):,} columns; expected at most {MAX_COLUMNS:,}. Remove some.")
    return header, [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]


def _parquet_columns(file: Path) -> dict[str, list[Any]]:
    content = read_bytes(file, max_bytes=MAX_TABLE_BYTES, follow_links=True)
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file}: reading Parquet needs pyarrow. Install it (pip install pyarrow), or save the table as CSV."
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        _check_size(table.metadata, file)
        # Texts stay in dictionaries: a long one, stored once for many rows, is not copied before it is counted.
        texts = [c.path for c in map(table.schema.column, range(len(table.schema))) if c.physical_type == "BYTE_ARRAY"]
        table = pyarrow.parquet.ParquetFile(io.BytesIO(content), metadata=table.metadata, read_dictionary=texts)
        columns: dict[str, list[Any]] = {name: [] for name in table.schema_arrow.names}
        read = 0
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            read += sum(map(_unpacked_bytes, batch.columns))
            _refuse_more(read, MAX_TABLE_BYTES, "bytes when unpacked", file)
            for name, values in batch.to_pydict().items():
                columns[name] += values
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:  # no date that Python knows
        raise UserError(f"{file} is no Parquet file that can be read ({plain(error)}). Write it again.") from None
    return columns


def _unpacked_bytes(values: Any) -> int:
    """Bytes of an Arrow array once each value has a copy of its own."""
    import pyarrow.compute
    import pyarrow.types

    kind = values.type
    if pyarrow.types.is_dictionary(kind):
        texts = values.dictionary
        if not (pyarrow.types.is_string(texts.type) or pyarrow.types.is_binary(texts.type)):
            return int(values.nbytes)
        return pyarrow.compute.sum(pyarrow.compute.binary_length(texts).take(values.indices)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(map(_unpacked_bytes, values.flatten()))
    if pyarrow.types.is_map(kind):
        return _unpacked_bytes(values.keys) + _unpacked_bytes(values.items)
    if pyarrow.types.is_nested(kind):  # lists of all kinds
        return _unpacked_bytes(values.flatten())
    return int(values.nbytes)


def _check_size(metadata: Any, file: Path) -> None:
    """Raises UserError for a Parquet file whose metadata announce too much, before a value is read."""
    _refuse_more(metadata.num_rows, MAX_ROWS, "rows", file)
    _refuse_more(metadata.num_columns, MAX_COLUMNS, "columns", file)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    _refuse_more(sum(g.column(i).num_values for g in groups for i in range(g.num_columns)), MAX_CELLS, "values", file)


def _refuse_more(count: int, most: int, what: str, file: Path) -> None:
    if count > most:
        raise UserError(f"{plain(file)} has more than {most:,} {what}; expected at most so many. Divide it.")


def _cell(value: Any) -> str:
    """A value as CSV would hold it; several labels may be a list."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return "|".join(map(_cell, value))
    return (
        str(int(value)) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else str(value)
    )
