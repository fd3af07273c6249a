"""A disk that is full costs a sweep no worker and no word: one message with the reason, and outputs that cannot be
written (Slurm's output file on a full home) end nothing."""

import os
import runpy
import sys
import traceback
from pathlib import Path

import pytest
from helpers import crashes, runs

from mambapeft_vision.results.record import is_finished
from mambapeft_vision.sweep import worker
from mambapeft_vision.sweep.jobs import plan_jobs
from mambapeft_vision.sweep.pool import assignment_of
from mambapeft_vision.sweep.worker_cache import Kept


def no_space(*_, **__):
    raise OSError(28, os.strerror(28))


def test_a_full_disk_ends_the_sweep_with_its_reason(task, tmp_path, monkeypatch):
    (job,) = plan_jobs([*runs.overrides(task, tmp_path), "method=lora_p_x"], runs.CONFIGS)
    monkeypatch.setattr("os.replace", no_space)
    outcome = worker.run(assignment_of(job), Kept())
    assert "No space left on device" in outcome.error and outcome.ends_sweep and not outcome.last
    assert not is_finished(job.folder)


def say_much_to_a_full_disk():
    worker.print_to(Path("/dev/full"))
    print("x" * 100_000)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        traceback.print_exc()
    print("ü\ud800", file=sys.stderr)
    sys.exit(7)


def test_a_worker_whose_log_cannot_be_written_goes_on():
    assert crashes.run_to_end(say_much_to_a_full_disk) == 7


def sweep_to_a_full_disk(*command: str) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
    script = str(runs.ROOT / "scripts" / "sweep_vtab1k.py")
    sys.argv = [script, *command]
    crashes.fork_workers()
    runpy.run_path(script, run_name="__main__")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_an_output_that_cannot_be_written_ends_no_sweep(task, tmp_path):
    command = [*runs.overrides(task, tmp_path, "trainer.max_epochs=1", "trainer.warmup_epochs=0"), "workers=1"]
    assert crashes.run_to_end(sweep_to_a_full_disk, *command) == 0
    assert len(list(tmp_path.rglob("result.json"))) == 1
