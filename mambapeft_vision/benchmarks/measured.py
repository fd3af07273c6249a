"""CSV files of measurements. Their first line names card, versions, commit and day, so that every table has them."""

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.environment import device_name, git_state, library_versions

STAMP = "# measured: "


def stamp(device: str | None = None) -> str:
    """Card or CPU, versions, commit and day, in one line. device: default: a GPU where there is one."""
    versions = library_versions()
    machine = device_name(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    commit, dirty = git_state()
    code = f"commit {commit[:10]}{' with changes' if dirty else ''}" if commit else "commit unknown"
    named = [f"{label} {versions[key]}" for key, label in _SHOWN.items() if key in versions]
    return ", ".join([machine, *named, code, datetime.now(timezone.utc).date().isoformat()])


_SHOWN = {"python": "Python", "torch": "PyTorch", "cuda": "CUDA", "triton": "Triton", "lightning": "Lightning"}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes rows of the same keys as CSV below the stamp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{STAMP}{stamp()}\n{csv_text(rows)}")


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
