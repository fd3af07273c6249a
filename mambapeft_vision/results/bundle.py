"""Many results in one small JSON file, `<name>.runs.json`: common values once, then a line a run.

`columns` names what a line has: fields of `RunRecord`, and sections of its config as `config.<section>`. A column in
`values` lists its distinct values there, and lines have their places in that list.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mambapeft_vision.results.files import read_text
from mambapeft_vision.results.layout import BUNDLE_SUFFIX
from mambapeft_vision.results.record import SCHEMA_VERSION, RunRecord, config_size, record_of
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.untrusted import parse_json

FORMAT = 1
MOST_RUNS = 200_000
MOST_VALUES = 10_000_000
MOST_CONFIG_BYTES = 1_000_000_000  # of all runs together, each by itself
ABSENT = {"absent": True}  # stands for a section of the config that a run does not have


def write_bundle(path: Path, records: Iterable[RunRecord]) -> None:
    """Writes records, sorted; the same records always make the same bytes. Raises UserError for a wrong file name."""
    if not path.name.endswith(BUNDLE_SUFFIX):
        raise UserError(f"{path}: expected a name that ends in {BUNDLE_SUFFIX}")
    rows = sorted((_flat(record) for record in records), key=_order)
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = {name: [_text(row.get(name, ABSENT)) for row in rows] for name in names}
    distinct = {name: list(dict.fromkeys(column)) for name, column in texts.items()}
    common = [name for name in names if len(distinct[name]) == 1]
    columns = [name for name in names if len(distinct[name]) > 1]
    listed = {name: distinct[name] for name in columns if _is_shorter_listed(texts[name], distinct[name])}
    places = {name: {text: str(place) for place, text in enumerate(values)} for name, values in listed.items()}
    lines = [
        "[" + ",".join(places[name][texts[name][i]] if name in listed else texts[name][i] for name in columns) + "]"
        for i in range(len(rows))
    ]
    parts = [
        f'"format": {FORMAT}',
        f'"schema_version": {SCHEMA_VERSION}',
        '"common": {\n' + ",\n".join(f"{_text(name)}: {distinct[name][0]}" for name in common) + "\n}",
        '"values": {\n' + ",\n".join(f"{_text(n)}: [\n{_lines(values)}\n]" for n, values in listed.items()) + "\n}",
        f'"columns": {_text(columns)}',
        f'"runs": [\n{_lines(lines)}\n]',
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def read_bundle(path: Path) -> list[RunRecord]:
    """The results, each checked as strictly as a result.json. Raises UserError."""
    text = read_text(path, "a bundle of runs")
    try:
        content = parse_json(text, str(path), max_values=MOST_VALUES)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        columns, values, common, lines = (content[key] for key in ("columns", "values", "common", "runs"))
        # Equal lines would be the same run twice; so few columns cannot tell so many runs apart.
        if len(lines) > (MOST_RUNS if columns else 1):
            raise ValueError(f"{len(lines):,} runs in {len(columns)} columns")
        records: list[RunRecord] = []
        sizes: dict[int, int] = {}
        total = 0
        for number, line in enumerate(lines, start=1):
            row = _nested(_row(number, line, columns, values, common))
            total += config_size(row["config"], sizes)
            if total > MOST_CONFIG_BYTES:  # which sections that runs share hide
                raise ValueError(f"configs of more than {MOST_CONFIG_BYTES:,} bytes")
            records.append(record_of(row, f"{path}, run {number}", sizes))
        return records
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no bundle of runs ({type(error).__name__}: {plain(error)}); pack the runs again"
        ) from error


def _row(
    number: int, line: Sequence[Any], columns: Sequence[str], values: Mapping[str, Any], common: Mapping[str, Any]
) -> dict[str, Any]:
    if len(line) != len(columns):
        raise ValueError(f"run {number} has {len(line)} values, expected {len(columns)}")
    return {**common, **{name: values[name][v] if name in values else v for name, v in zip(columns, line)}}


def _flat(record: RunRecord) -> dict[str, Any]:
    content = asdict(record)
    config = content.pop("config")
    return content | {f"config.{section}": value for section, value in config.items()}


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    config = {name.removeprefix("config."): v for name, v in row.items() if name.startswith("config.") and v != ABSENT}
    return {name: value for name, value in row.items() if not name.startswith("config.")} | {"config": config}


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["methods"], row["seed"], row["fingerprint"], row["finished_at"]


def _is_shorter_listed(column: Sequence[str], distinct: Sequence[str]) -> bool:
    digits = len(str(len(distinct)))
    return sum(map(len, distinct)) + digits * len(column) < sum(map(len, column))


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _lines(texts: Sequence[str]) -> str:
    return ",\n".join(texts)
