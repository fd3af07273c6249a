"""explorer.html: every finished run in one self-contained page, to sort, to filter and to look into.

The page has one script. Names in results can come from anybody, so they are data of the page (a block of JSON without
`<`), and the script writes them as text only. The page's policy lets no other script run and fetches nothing.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.results.predictions import read_class_names, read_labels
from mambapeft_vision.results.record import DERIVED, RunRecord, members_of
from mambapeft_vision.results.tables import Found, Standard
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import command, override, plain

MOST_DRAWN = 20  # classes of a confusion matrix; of more classes the most frequent confusions are listed
MOST_CONFUSIONS = 12


@dataclass(frozen=True)
class Names:
    """Names for commands: registered name → config of backbones, and the tasks that have a config."""

    backbones: Mapping[str, str]
    tasks: frozenset[str]


def read_names(configs: Path) -> Names:
    """Reads the names from the folder `configs`."""
    backbones: dict[str, str] = {}
    for file in sorted((configs / "backbone").glob("*.yaml")):
        found = re.search(r"^name: (\S+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            backbones.setdefault(found[1], file.stem)
    tasks = (file.relative_to(configs / "dataset").with_suffix("") for file in (configs / "dataset").rglob("*.yaml"))
    return Names(backbones, frozenset(map(str, tasks)))


def explorer(found: Iterable[Found], standard: Standard, names: Names, *, title: str) -> str:
    """The page, with a row for each result."""
    rows = [_row(one, standard, names) for one in found]
    data = json.dumps({"title": plain(title), "rows": rows}, ensure_ascii=True, separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    templates = files("mambapeft_vision.results") / "templates"
    page = (templates / "explorer.html").read_text(encoding="utf-8")
    script = (templates / "explorer.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    for mark, text in (("HASH", digest), ("SCRIPT", script), ("DATA", data)):  # data last: they may hold the marks
        page = page.replace(f"@@{mark}@@", text, 1)
    return page


def _row(found: Found, standard: Standard, names: Names) -> dict[str, Any]:
    record = found.record
    preset, settings = standard.describe(record.config)
    dataset = record.config["dataset"]
    changed = ", ".join(f"{key}={value}" for key, value in settings.items())
    row = {
        "method": plain(preset),
        "settings": plain(changed, 1_000),
        "family": _family(record),
        "backbone": plain(record.backbone),
        "task": plain(record.task),
        "split": plain(dataset["test_split"]),
        "seed": record.seed,
        "accuracy": round(100 * record.accuracy, 3),
        "trained": record.trainable,
        "head": record.head,
        "seconds": round(record.train_seconds, 1),
        "device": plain(record.device_name),
        "images": plain(record.image_format or "not recorded"),
        "finished": plain(record.finished_at, 40),
        "command": plain(_command(record, preset, settings, standard, names), 2_000),
    }
    confusion = None if found.folder is None else _confusion(found.folder)
    return row if confusion is None else {**row, "confusion": confusion}


def _family(record: RunRecord) -> str:
    """The file of the methods' classes, such as `lora`; `hybrid` where there are several."""
    targets = {str(spec.get("_target_", "")).split(".")[-2:][0] for spec in record.config["method"].values()}
    return plain(targets.pop()) if len(targets) == 1 else "hybrid"


def _command(record: RunRecord, preset: str, settings: Mapping[str, Any], standard: Standard, names: Names) -> str:
    """The command that repeats a run, as far as its result records it; for derived results, the runs they are from."""
    derived = record.config.get(DERIVED)
    if derived is not None:
        return f"made from finished runs: {derived['kind']}, {derived['label']}, {len(members_of(record))} runs"
    methods = preset if preset in standard.presets else f"[{','.join(record.methods)}]"
    backbone = record.config["backbone"].get("name")
    dataset = record.config["dataset"]
    words = [
        override("backbone", names.backbones.get(str(backbone), backbone)),
        override("dataset", record.task) if record.task in names.tasks else "dataset=folder",
        f"method={methods}",
        override("seed", record.seed),
    ]
    if record.task not in names.tasks:
        words += [override("dataset.name", record.task), override("dataset.folder", dataset.get("folder", "DIR"))]
    words += [override(_key(key, standard), value) for key, value in settings.items()]
    return command("mambapeft", "train", *words)


def _key(name: str, standard: Standard) -> str:
    """A setting's key as commands have it; `Standard.describe` leaves the section out."""
    if "." in name:
        return f"method.{name}"
    if name in standard.trainer:
        return f"trainer.{name}"
    return f"dataset.{name}" if name in standard.protocol else name


def _confusion(folder: Path) -> dict[str, Any] | None:
    """A matrix of counts, or the most frequent confusions; None where the run left no predictions that can be read."""
    if not (folder / PREDICTIONS_FILE).is_file():
        return None
    try:
        predicted, labels = read_labels(folder)
        names = read_class_names(folder)
    except UserError:
        return None
    count = int(max(predicted.max(), labels.max())) + 1
    known = names is not None and len(names) >= count
    words = [plain(name, 40) for name in names[:count]] if names is not None and known else None
    if count <= MOST_DRAWN:
        matrix = np.zeros((count, count), dtype=np.int64)
        np.add.at(matrix, (labels, predicted), 1)
        return {"matrix": matrix.tolist(), "names": words or [str(number) for number in range(count)]}
    wrong = labels != predicted
    # Both in one number: classes are below 2^31.
    pairs, counts = np.unique(labels[wrong] * count + predicted[wrong], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    found = [(*divmod(int(pairs[i]), count), int(counts[i])) for i in most]
    return {"pairs": [[_name(words, label), _name(words, said), number] for label, said, number in found]}


def _name(words: Sequence[str] | None, number: int) -> str:
    return str(number) if words is None else words[number]
