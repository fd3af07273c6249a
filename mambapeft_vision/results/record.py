"""result.json: one record a run, written last; a run folder with one is a finished run."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mambapeft_vision.results.files import read_text
from mambapeft_vision.results.layout import METRICS_FILE, PREDICTIONS_FILE, RESULT_FILE
from mambapeft_vision.results.migrations import migrated_result
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_file, sha256_json
from mambapeft_vision.utils.names import LONGEST, MOST_PARTS
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.typed import build
from mambapeft_vision.utils.untrusted import parse_json

SCHEMA_VERSION = 3
# Keys in result.json beside the record's fields; results of earlier releases have none.
CHECKSUM = "sha256"  # of the rest of the file
FILES = "files"  # sha256 of files of the run that have no checksum of their own, by name
REMEDY = "Run again with resume=false"
#: Section of the config of a result that was made from finished runs without training: kind, label, members (their
#: fingerprints). Tables show the label as a setting of that name.
DERIVED = "derived"
DERIVED_KINDS = ("ensemble", "interpolation")

# Limits on which every reader of a result relies; a file may come from anybody.
_LONGEST_TEXT = 10_000  # characters
_MOST_ITEMS = 1_000  # items of a list or mapping beside the config and the names of classes
_MOST_CLASSES = 100_000
_LARGEST_CONFIG = 4_000_000  # bytes, as `config_size` counts them; a run's has 5,000
_LARGEST = 2**63
_TASK = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_METHOD = re.compile(r"\w+")
_SECTIONS = ("backbone", "dataset", "trainer", "method")
_SPLITS = ("train_split", "test_split")


@dataclass(frozen=True)
class RunRecord:
    """The outcome of one run, and what it was made from.

    Schema 3. Accuracies are shares (0 to 1), times seconds, memory bytes. A change of a field's meaning, a new field or
    a removed one gets a new schema version.
    """

    task: str  # "vtab/cifar"
    group: str  # natural, specialized, structured, demo or custom
    methods: list[str]  # sorted names
    seed: int
    accuracy: float  # top-1 of the last weights, merged, on the test split; mean average precision with multi_label
    loss: float  # mean (binary) cross entropy there
    num_test: int  # images tested
    epochs: int
    train_loss: float  # mean over the last epoch, as trained (dropout and drop path on)
    train_accuracy: float
    trainable: int  # trained parameters without the head
    trainable_by_method: dict[str, int]
    head: int  # trained parameters of the classification head
    frozen: int  # parameters of the backbone that stay as they are
    unmerged: dict[str, str]  # methods that could not be merged for the test, with the reason
    train_images_per_second: float
    test_images_per_second: float  # decoding included
    train_seconds: float  # all epochs, also those before an interruption
    wall_seconds: float  # the process that finished the run, plus train_seconds of those before it
    peak_memory_bytes: int  # on a GPU: allocated there; on a CPU: resident
    device: str  # "cpu", "cuda:0"
    device_name: str
    kernel: str  # the backend that ran
    precision: str
    backbone: str
    backbone_sha256: str
    data_manifest: str  # hash of the task's files
    image_format: str | None  # how the images are encoded, such as "jpeg", "png" or "jpeg+png"; None: not recorded
    class_names: list[str] | None  # by label; None: the data have none, or they were not recorded
    multi_label: bool  # whether an image may have several labels
    fingerprint: str  # sha256 of everything in the config that decides the result
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    finished_at: str  # ISO 8601, UTC
    config: dict[str, Any]  # resolved
    schema_version: int = SCHEMA_VERSION


def is_derived(record: RunRecord) -> bool:
    """Whether a result was made from finished runs instead of by a run of its own."""
    return DERIVED in record.config


def members_of(record: RunRecord) -> list[str]:
    """Fingerprints of the runs that a result was made from; [] for a run's own, and where the record names none."""
    members = record.config.get(DERIVED, {}).get("members")
    return [one for one in members if isinstance(one, str)] if isinstance(members, list) else []


def write_record(folder: Path, record: RunRecord) -> None:
    """Writes result.json atomically, with a checksum. The last thing a run does."""
    files = {name: sha256_file(folder / name) for name in (METRICS_FILE, PREDICTIONS_FILE) if (folder / name).is_file()}
    content = json.loads(json.dumps({**asdict(record), FILES: files}, allow_nan=False))  # as a reader gets it
    write_json(folder / RESULT_FILE, content | {CHECKSUM: sha256_json(content)})


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds a result."""
    return (folder / RESULT_FILE).is_file()


def read_record(path: str | Path) -> RunRecord:
    """Reads result.json (or the one in a run's folder), strictly.

    Raises: UserError naming the file and every missing, unknown or mistyped field, and for one that is damaged.
    """
    path = Path(path)
    path = path / RESULT_FILE if path.is_dir() else path
    content = _read(path)
    if isinstance(content, dict):
        content.pop(FILES, None)
    return record_of(content, str(path))


def recorded_sha256(folder: Path, name: str) -> str | None:
    """The sha256 that a file of a finished run had when its result was written; None where it was not recorded.

    Raises: UserError for a damaged result.json.
    """
    if not is_finished(folder):
        return None
    content = _read(folder / RESULT_FILE)
    files = content.get(FILES) if isinstance(content, dict) else None
    sha256 = files.get(name) if isinstance(files, dict) else None
    return None if sha256 is None else str(sha256)


def check_recorded(folder: Path, name: str, sha256: str) -> None:
    """Raises UserError unless a file of a finished run, with content of this sha256, is the one that the run wrote."""
    if recorded_sha256(folder, name) not in (None, sha256):
        raise UserError(
            f"{plain(folder / name)} is not as it was written: damaged, changed by hand or of another run. Copy it "
            f"again from where it was made, or run again with resume=false"
        )


def _read(path: Path) -> Any:
    """The content of result.json without its checksum. Raises UserError if it is not as it was written."""
    content = parse_json(read_text(path, "the folder of a finished run"), str(path))
    if isinstance(content, dict) and CHECKSUM in content and content.pop(CHECKSUM) != sha256_json(content):
        raise UserError(
            f"{plain(path)} is not as it was written: damaged or changed by hand. Copy it again from where it was "
            f"made, or run again with resume=false"
        )
    return content


def record_of(content: Any, where: str, sizes: dict[int, int] | None = None) -> RunRecord:
    """The result that was written as `content`.

    The content is checked as untrusted data: names are names (no paths), sizes are bounded, and the sections of the
    config that tables and reports read are there. Text is only bounded in length: code that shows it uses `utils.text`.

    sizes: see `config_size`.

    Raises: UserError naming `where` and what is wrong.
    """
    config = content.get("config") if isinstance(content, dict) else None
    if isinstance(config, dict) and config_size(config, sizes) > _LARGEST_CONFIG:
        raise UserError(f"{where} is no result: its config has more than {_LARGEST_CONFIG:,} bytes. {REMEDY}")
    content = migrated_result(content)
    if not isinstance(content, dict):
        raise UserError(f"{where} is no result of schema {SCHEMA_VERSION}: expected an object. {REMEDY}")
    if content.get("schema_version") != SCHEMA_VERSION:
        version = shown(content.get("schema_version"))
        raise UserError(
            f"{where} is no result of schema {SCHEMA_VERSION}: schema_version is {version}. It was made by another "
            f"release: use that one"
        )
    where = f"{where} is no result of schema {SCHEMA_VERSION}"
    config = content.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{where}: config={shown(config)}; expected keys and values. {REMEDY}")
    _check_sizes(content, where)
    # The config is checked apart: it is the largest part, and results of a bundle share it.
    record = replace(build(RunRecord, {**content, "config": {}}, where, remedy=REMEDY), config=config)
    for problem in (*_wrong_values(record), *_wrong_sections(config)):
        raise UserError(f"{where}: {problem}. {REMEDY}")
    return record


def config_size(config: Mapping[str, Any], sizes: dict[int, int] | None = None) -> int:
    """About as many bytes as a config takes in memory, or in a file of its own.

    sizes: of sections by their identity, for configs that share them; more are added.
    """
    sizes = {} if sizes is None else sizes
    for section in config.values():
        if id(section) not in sizes:
            sizes[id(section)] = _size(section)
    return sum(sizes[id(section)] for section in config.values())


def _size(value: Any) -> int:
    total, stack = 0, [value]
    while stack:
        value = stack.pop()
        total += 64 + (len(value) if isinstance(value, str) else 0)
        if isinstance(value, dict):
            total += sum(map(len, value))
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
    return total


def _check_sizes(content: Mapping[str, Any], where: str) -> None:
    for name, value in content.items():
        if name == "config":
            continue
        items = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else [value]
        most = _MOST_CLASSES if name == "class_names" else _MOST_ITEMS
        if len(items) > 2 * most:
            raise UserError(f"{where}: {plain(name)} has {len(items):,} items; expected at most {most}. {REMEDY}")
        if any(isinstance(item, str) and len(item) > _LONGEST_TEXT for item in items):
            raise UserError(f"{where}: {plain(name)} has a text of more than {_LONGEST_TEXT:,} characters. {REMEDY}")


def _wrong_values(record: RunRecord) -> list[str]:
    problems = []
    parts = record.task.split("/")
    if not _TASK.fullmatch(record.task) or len(parts) > MOST_PARTS or any(len(p.encode()) > LONGEST for p in parts):
        problems.append(f"task={shown(record.task)}; expected names in parts split by '/'")
    for name in record.methods:
        if not _METHOD.fullmatch(name) or len(name.encode()) > LONGEST:
            problems.append(f"methods: {shown(name)}; expected letters, digits and underscores")
    if not record.fingerprint.isprintable() or not record.fingerprint.isascii() or len(record.fingerprint) > 200:
        problems.append(f"fingerprint={shown(record.fingerprint)}; expected a hash")
    for name in ("accuracy", "train_accuracy"):
        if not 0 <= getattr(record, name) <= 1:
            problems.append(f"{name}={getattr(record, name)}; expected 0 to 1")
    numbers = {name: value for name, value in vars(record).items() if isinstance(value, (int, float))}
    numbers |= {f"trainable_by_method.{name}": value for name, value in record.trainable_by_method.items()}
    for name, value in numbers.items():
        if not -_LARGEST < value < _LARGEST or (value < 0 and name not in ("seed", "loss", "train_loss")):
            problems.append(f"{plain(name)}={shown(value)}; expected a number of at least 0 and below 2^63")
    return problems


def _wrong_sections(config: Mapping[str, Any]) -> list[str]:
    problems = [
        f"config.{name}={shown(config.get(name))}; expected keys and values"
        for name in _SECTIONS
        if not isinstance(config.get(name), dict)
    ]
    if problems:
        return problems
    dataset, sweep = config["dataset"], config.get("sweep")
    problems += [
        f"config.dataset.{name}={shown(dataset.get(name))}; expected the name of a split"
        for name in _SPLITS
        if not isinstance(dataset.get(name), str)
    ]
    problems += [
        f"config.{section}.{key}={shown(config[section].get(key))}; expected a number"
        for section, key in (("dataset", "batch_size"), ("trainer", "learning_rate"))
        if isinstance(config[section].get(key, 0), bool) or not isinstance(config[section].get(key, 0), (int, float))
    ]
    problems += [
        f"config.method.{shown(name)}={shown(spec)}; expected letters, digits and underscores, with settings"
        for name, spec in config["method"].items()
        if not _METHOD.fullmatch(name) or not isinstance(spec, dict)
    ]
    derived = config.get(DERIVED, {"kind": DERIVED_KINDS[0], "label": ""})
    if not (isinstance(derived, dict) and derived.get("kind") in DERIVED_KINDS and _is_name(derived.get("label"))):
        problems.append(f"config.{DERIVED}={shown(derived)}; expected a kind ({', '.join(DERIVED_KINDS)}) and a label")
    if sweep is not None and not isinstance(sweep, str):
        problems.append(f"config.sweep={shown(sweep)}; expected text")
    return problems


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and len(text) <= 100
