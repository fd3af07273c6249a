"""A sweep that reports to W&B, end to end without network: what a dashboard and the tables need is read back."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import wandb
from helpers import crashes, runs
from helpers.wandb_files import OfflineRun, offline_runs
from PIL import Image

from mambapeft_vision.results.record import RunRecord, read_record
from mambapeft_vision.results.tables import collect, read_standard, tables_of, to_markdown

PICTURES = {"pictures/predictions", "pictures/curves", "pictures/confusion"}


def command(task: Path, outputs: Path, *more: str) -> list[str]:
    return [
        *(text for text in runs.overrides(task, outputs, *more) if not text.startswith("method.")),
        "trainer.max_epochs=2",
        "method=linear_probe,a",
        "sweep=first try",
    ]


def run_sweep(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    code, out, err = crashes.command(Path.cwd(), "scripts/sweep_vtab1k.py", *arguments, environment=environment)
    assert code == 0, out + err


def check_run(run: OfflineRun, record: RunRecord, folder: Path) -> None:
    methods = "+".join(record.methods)
    assert (run.name, run.group, run.job_type) == (f"custom/tiny {methods} seed {record.seed}", "custom/tiny", "run")
    assert set(run.tags) >= set(record.methods)
    # A dashboard groups by these, and finds the sweep's run, whose id is the sweep's name.
    grouping = {key: run.config[key] for key in ("task", "methods", "seed", "sweep")}
    assert grouping == {"task": "custom/tiny", "methods": methods, "seed": record.seed, "sweep": "first try"}
    rows = [row for row in run.history if "train/loss" in row]
    expected = runs.read_metrics(folder)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert [row["train/loss"] for row in rows] == [float(row["loss"]) for row in expected]
    pictures = {key: value for row in run.history for key, value in row.items() if key.startswith("pictures/")}
    assert pictures.keys() == PICTURES
    for entry in pictures.values():
        with Image.open(run.file(entry)) as image:
            image.load()
    assert run.exit_code == 0


def check_parent(parent: OfflineRun, children: list[OfflineRun], tables: list) -> None:
    assert (parent.id, parent.name, parent.job_type) == ("first-try", "first try", "sweep")
    assert parent.config["sweep"] == "first try"
    assert set(parent.config["runs"]) == {child.id for child in children}
    assert (parent.summary["planned"], parent.summary["finished"]) == (2, 2)
    logged = {key: value for row in parent.history for key, value in row.items()}
    for name in ("accuracy-custom-vim_pico_patch8_32", "tasks-custom-vim_pico_patch8_32"):
        with Image.open(parent.file(logged[f"pictures/{name}"])) as image:
            assert image.width > 500
    for table in tables:
        content = json.loads(parent.file(logged[f"tables/{table.title}"]).read_text())
        assert content["columns"] == list(table.header)
        assert content["data"] == [list(row) for row in table.rows]


def from_summary(run: OfflineRun) -> RunRecord:
    """The record that W&B holds: what the tables need is in the summary and the config."""
    config = {key: value for key, value in run.config.items() if key not in ("task", "methods", "_wandb")}
    known = {key: value for key, value in run.summary.items() if key in RunRecord.__dataclass_fields__}
    return RunRecord(**{"unmerged": {}, "trainable_by_method": {}, **known, "config": config})


def check_all(outputs: Path) -> None:
    folders = {(folder / "wandb_id.txt").read_text(): folder for folder in outputs.glob("custom/tiny/*/*")}
    found = offline_runs(outputs)
    children = [run for run in found if run.job_type == "run"]
    (parent,) = (run for run in found if run.job_type == "sweep")
    assert {run.id for run in children} == folders.keys() and len(children) == 2
    for run in children:
        check_run(run, read_record(folders[run.id]), folders[run.id])

    standard = read_standard(runs.CONFIGS)
    (ours,) = collect(map(read_record, folders.values()), standard)
    (theirs,) = collect(map(from_summary, children), standard)
    assert [to_markdown(table) for table in tables_of(theirs)] == [to_markdown(table) for table in tables_of(ours)]
    check_parent(parent, children, tables_of(ours))


@pytest.mark.slow
def test_a_sweep_and_its_runs_are_on_wandb_at_once_or_later(tmp_path, monkeypatch, capsys):
    task, outputs = runs.lay_out_task(tmp_path / "task"), tmp_path / "outputs"
    run_sweep(*command(task, outputs, "logger=wandb", "logger.mode=offline"))
    check_all(outputs)

    # As if they had been made without W&B: uploading makes the same of them, once.
    for folder in outputs.glob("custom/tiny/*/*"):
        shutil.rmtree(folder / "wandb")
        (folder / "wandb_id.txt").unlink()
        for picture in ("curves.png", "confusion.png"):
            (folder / picture).unlink()
    shutil.rmtree(outputs / ".sweep")
    script = runs.ROOT / "scripts" / "sync_results_wandb.py"
    upload = [script.name, str(outputs), "--offline", "--tags", "later"]
    monkeypatch.setattr(sys, "argv", [*upload, "--sweeps"])
    runpy.run_path(str(script), run_name="__main__")
    wandb.teardown()  # what its service has in hand is in the files then, as at the end of a process
    check_all(outputs)
    assert all("later" in run.tags for run in offline_runs(outputs))
    assert "uploaded first try: 2 runs" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", upload)
    runpy.run_path(str(script), run_name="__main__")
    assert "0 runs uploaded, 2 left alone" in capsys.readouterr().out
    assert len(offline_runs(outputs)) == 3
