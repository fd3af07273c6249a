"""A sweep on a GPU: forked workers that use CUDA."""

import subprocess
import sys

import pytest
import torch
from helpers import runs

from mambapeft_vision.results.record import read_record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, which is not here"),
]


def test_runs_of_two_forked_workers_are_those_of_a_run_alone(tmp_path):
    task = runs.lay_out_task(tmp_path / "task")
    more = ["trainer.device=cuda", "trainer.max_epochs=2", "seed=0,1,2"]
    sweep = [sys.executable, "-c", "from mambapeft_vision.cli import run; run('sweep')"]
    subprocess.run([*sweep, "--workers", "2", *runs.overrides(task, tmp_path / "out", *more)], check=True)
    logs = list((tmp_path / "out" / ".sweep").glob("worker*.log"))
    assert len(logs) == 2
    folders = sorted(file.parent for file in (tmp_path / "out").rglob("result.json"))
    assert [read_record(folder).seed for folder in folders] == [0, 1, 2]
    for folder in folders:
        seed = read_record(folder).seed
        runs.run(runs.overrides(task, tmp_path / "alone", *more[:2], f"seed={seed}"))
        tensors = runs.read_adapter_tensors(tmp_path / "alone" / folder.relative_to(tmp_path / "out"))
        assert all(torch.equal(tensors[name], value) for name, value in runs.read_adapter_tensors(folder).items())
