"""Reads what W&B's offline mode writes: run-*.wandb is a log of protocol buffers in LevelDB's format."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What `wandb sync` would upload."""

    id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    folder: Path = Path()

    def file(self, entry: dict[str, Any]) -> Path:
        """Of an image or table in the history."""
        return self.folder / "files" / entry["path"]


def offline_runs(below: Path) -> list[OfflineRun]:
    """The runs in W&B's files. Its own process writes them, on a busy machine after `finish` has returned."""
    deadline = time.monotonic() + 20
    while True:
        found = [read_offline_run(file) for file in sorted(below.rglob("offline-run-*/run-*.wandb"))]
        if all(run.job_type for run in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def read_offline_run(file: Path) -> OfflineRun:
    run = OfflineRun(folder=file.parent)
    for content in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.name = record.run.run_id, record.run.display_name
            run.group, run.job_type, run.tags = record.run.run_group, record.run.job_type, list(record.run.tags)
            _update(run.config, record.run.config.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            run.history.append(row)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *path, last = item.nested_key or [item.key]
        place = target
        for key in path:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)


def _records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    position, parts = FILE_HEADER, b""
    while position + CHUNK_HEADER <= len(content):
        if BLOCK - position % BLOCK < CHUNK_HEADER:  # too little for a header is left at the end of a block
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        assert kind in (WHOLE, FIRST, MIDDLE, LAST)
        position += CHUNK_HEADER
        parts += content[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
