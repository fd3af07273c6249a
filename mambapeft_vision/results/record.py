"""result.json: one record a run, written last; a run folder with one is a finished run."""

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mambapeft_vision.results.migrations import migrated_result
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.errors import UserError

RESULT_FILE = "result.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunRecord:
    """The outcome of one run, and what it was made from.

    Schema 1. Accuracies are shares (0 to 1), times seconds, memory bytes. A change of a field's meaning, a new field or
    a removed one gets a new schema version.
    """

    task: str  # "vtab/cifar"
    group: str  # natural, specialized, structured, demo or custom
    methods: list[str]  # sorted names
    seed: int
    accuracy: float  # top-1 of the last weights, merged, on the test split
    loss: float  # mean cross entropy there
    num_test: int  # images tested
    epochs: int
    train_loss: float  # mean over the last epoch, as trained (dropout and drop path on)
    train_accuracy: float
    trainable: int  # trained numbers without the head
    trainable_by_method: dict[str, int]
    head: int  # trained numbers of the classification head
    frozen: int  # numbers of the backbone that stay as they are
    unmerged: dict[str, str]  # methods that could not be merged for the test, with the reason
    train_images_per_second: float
    test_images_per_second: float  # decoding included
    train_seconds: float  # all epochs, also those before an interruption
    wall_seconds: float  # of the process that finished the run, and train_seconds of those before it
    peak_memory_bytes: int  # on a GPU: allocated there; on a CPU: resident
    device: str  # "cpu", "cuda:0"
    device_name: str
    kernel: str  # the backend that ran
    precision: str
    backbone: str
    backbone_sha256: str
    data_manifest: str  # hash of the task's files
    fingerprint: str  # sha256 of everything in the config that decides the result
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    finished_at: str  # ISO 8601, UTC
    config: dict[str, Any]  # resolved
    schema_version: int = SCHEMA_VERSION


def write_record(folder: Path, record: RunRecord) -> None:
    """Writes result.json atomically. The last thing a run does."""
    write_json(folder / RESULT_FILE, asdict(record))


def is_finished(folder: Path) -> bool:
    return (folder / RESULT_FILE).is_file()


def read_record(path: str | Path) -> RunRecord:
    """Reads result.json (or the one in a run's folder), strictly.

    Raises: UserError naming the file and every missing, unknown or mistyped field.
    """
    path = Path(path)
    path = path / RESULT_FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected the folder of a finished run") from error
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}); run again with resume=false") from error
    return record_of(content, str(path))


def record_of(content: Any, where: str) -> RunRecord:
    """The record that was written as `content`. Raises: UserError naming `where` and every wrong field."""
    content = migrated_result(content)
    problems = _problems(content)
    if problems:
        raise UserError(f"{where} is no result of schema {SCHEMA_VERSION}: {'; '.join(problems)}")
    return RunRecord(**content)


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(RunRecord)


def _problems(content: Any) -> list[str]:
    if not isinstance(content, dict):
        return ["expected an object"]
    if content.get("schema_version") != SCHEMA_VERSION:
        return [f"schema_version is {content.get('schema_version')!r}"]
    types = _types()
    names = [field.name for field in fields(RunRecord)]
    problems = [f"{name} is missing" for name in names if name not in content]
    problems += [f"{name} is unknown" for name in content if name not in types]
    problems += [
        f"{name} is {content[name]!r}, expected {types[name]}"
        for name in names
        if name in content and not _fits(content[name], types[name])
    ]
    return problems


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has the annotated type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is UnionType:
        return any(_fits(value, option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
