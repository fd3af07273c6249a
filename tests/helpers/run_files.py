"""What must hold of the files of runs, whatever happened while they were written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import runs
from safetensors.torch import load_file

from mambapeft_vision.results.layout import CHECKPOINT_FILE
from mambapeft_vision.results.record import CHECKSUM, FILES, RESULT_FILE, read_record

MEASURED = {  # the fields of result.json that are measured, and so differ between any two runs
    "train_images_per_second",
    "test_images_per_second",
    "train_seconds",
    "wall_seconds",
    "peak_memory_bytes",
    "finished_at",
}


def check_same(one: Path, other: Path) -> None:
    """Two finished runs are equal but for what was measured; neither folder holds a file that the other lacks."""
    names = [{file.name for file in folder.iterdir()} for folder in (one, other)]
    assert names[0] == names[1], names[0] ^ names[1]
    for name in ("adapter.safetensors", "adapter_config.json", "predictions.npz", "config.yaml", "overrides.yaml"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    records = [result_of(folder / RESULT_FILE) for folder in (one, other)]
    for record in records:
        assert all(record.pop(field) is not None for field in MEASURED)
    assert records[0] == records[1]
    rows = [[(row["epoch"], row["step"], row["loss"], row["lr"]) for row in runs.read_metrics(f)] for f in (one, other)]
    assert rows[0] == rows[1]


def result_of(file: Path) -> dict[str, Any]:
    """What result.json says, without its checksums: to be changed and written again."""
    content = json.loads(file.read_text())
    del content[CHECKSUM], content[FILES]
    return content


def check_files(root: Path) -> None:
    """Whatever has its final name is whole."""
    readers = {
        RESULT_FILE: read_record,
        "adapter.safetensors": load_file,
        "adapter_config.json": lambda file: json.loads(file.read_text()),
        CHECKPOINT_FILE: lambda file: torch.load(file, weights_only=True),
        "predictions.npz": lambda file: dict(np.load(file)),
        "metrics.csv": lambda file: runs.read_metrics(file.parent)[-1]["loss"],
    }
    for file in root.rglob("*"):
        if file.name in readers:
            readers[file.name](file)
        if file.suffix == ".npy":
            np.load(file)
