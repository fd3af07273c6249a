"""Runs that a Hydra launcher starts in other processes: Submitit's local executor here, its Slurm one on a cluster."""

from pathlib import Path

import hydra_plugins.hydra_submitit_launcher  # noqa: F401 (without it every launch here fails, and less plainly)
import pytest
from helpers import crashes, runs

from mambapeft_vision.results.record import read_record


def written(outputs: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in outputs.rglob("result.json")}


@pytest.mark.slow
def test_a_sweep_through_submitit_reports_failures_and_repeats_nothing(tmp_path):
    task, outputs = runs.lay_out_task(tmp_path / "task"), tmp_path / "outputs"
    command = runs.overrides(task, outputs, "trainer.max_epochs=1", "trainer.warmup_epochs=0")
    launch = ("train.py", "-m", "hydra/launcher=submitit_local", *command)
    code, out, err = crashes.command(tmp_path, *launch, "method.lora_p_x.rank=2,0")
    results = written(outputs)
    assert [read_record(file).config["method"]["lora_p_x"]["rank"] for file in results] == [2]
    # The failure happened in another process; this one tells of it, and it is noted in the run's folder.
    assert code == 2 and "1 of the runs failed:" in err, out + err
    (failure,) = err.partition("failed:\n")[2].splitlines()
    assert "method.lora_p_x.rank=0 " in failure and "expected a whole number >= 1" in failure
    (note,) = outputs.rglob("failure.json")
    assert "expected a whole number >= 1" in note.read_text()
    assert not list(outputs.glob(".sweep/launch-*"))

    code, _, err = crashes.command(tmp_path, *launch, "method.lora_p_x.rank=2")
    assert code == 0 and written(outputs) == results, err
