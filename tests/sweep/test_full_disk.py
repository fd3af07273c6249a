"""A disk that is full costs a sweep no worker and no word: one message with the reason, and outputs that cannot be
written (Slurm's output file on a full home) end nothing."""

import errno
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
from mambapeft_vision.sweep.pool import Pool, SweepError, _Worker
from mambapeft_vision.sweep.worker_cache import Kept
from mambapeft_vision.utils.errors import NotFiniteError


class Watcher:
    def started(self, job):
        """Not looked at."""

    def ended(self, job, outcome):
        """Not looked at."""

    def refresh(self):
        """Not looked at."""


class HereAndNow:
    """A worker process and its connection, in one: what it is sent is run at once, in this process."""

    def send(self, assignment):
        self.outcome = assignment and worker.run(assignment, Kept())

    def recv(self):
        return self.outcome

    def poll(self):
        return True

    def is_alive(self):
        return True

    def __getattr__(self, name):  # of a process that ends by itself
        return lambda *_: None


@pytest.fixture
def one_sweep(task, tmp_path, monkeypatch):
    """Runs a sweep of two seeds → the error that ends it."""

    def sweep():
        jobs = plan_jobs([*runs.overrides(task, tmp_path), "seed=0,1"], runs.CONFIGS)
        monkeypatch.setattr(Pool, "_start", lambda *_: _Worker(*[HereAndNow()] * 2))
        monkeypatch.setattr(Pool, "_wait", lambda *_: None)
        with pytest.raises(SweepError) as ended:
            Pool(1, [], tmp_path).run(jobs, Watcher())
        assert not any(is_finished(job.folder) for job in jobs)
        return str(ended.value)

    return sweep


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_ends_the_sweep_with_its_reason(one_sweep, monkeypatch, code):
    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.replace", full)
    said = one_sweep()
    assert os.strerror(code) in said and said.startswith("seed 0: ")
    assert "every other run would write to the same disk" in said and "on_nonfinite" not in said


def test_numbers_that_are_not_finite_end_the_sweep_with_another(one_sweep, monkeypatch):
    def train(*_, **__):
        raise NotFiniteError("the loss is nan")

    monkeypatch.setattr(worker, "train", train)
    said = one_sweep()
    assert "the loss is nan" in said and "trainer.on_nonfinite=skip_run" in said and "disk" not in said


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
