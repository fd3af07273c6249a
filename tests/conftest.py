"""Shared by all tests: a known number of threads, no network, and a tiny task with a finished run of it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

# The project is imported inside the fixtures: tests/kernels chooses Triton's interpreter before its first import.


@dataclass(frozen=True)
class FinishedRun:
    """An uninterrupted tiny run; not to be changed by tests."""

    command: list[str]
    folder: Path
    record: Any  # a RunRecord


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Path:
    """A task of 40 images; not to be changed by tests."""
    from helpers import runs

    return runs.lay_out_task(tmp_path_factory.mktemp("task") / "tiny")


@pytest.fixture(scope="session")
def finished(task, tmp_path_factory) -> FinishedRun:
    from helpers import runs

    outputs = tmp_path_factory.mktemp("outputs")
    command = runs.overrides(task, outputs, "trainer.picture=true")
    record = runs.run(command)
    return FinishedRun(command, runs.only_run_folder(outputs), record)
