"""Two processes and one run."""

import multiprocessing
import os
import signal
import time
from contextlib import contextmanager

import pytest
from helpers import runs

from mambapeft_vision.run.failure_record import FAILURE_FILE
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.sweep.worker import Assignment, run
from mambapeft_vision.sweep.worker_cache import Kept
from mambapeft_vision.utils.lock import LOCK_FILE, InUseError, locked


def hold(folder, ready):
    with locked(folder):
        ready.send("locked")
        time.sleep(60)


@contextmanager
def held(folder):
    """A process that holds the folder's lock."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, theirs))
    process.start()
    assert ours.recv() == "locked"
    try:
        yield process
    finally:
        process.kill()
        process.join(10)


@pytest.fixture
def holder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with held(folder) as process:
        yield folder, process


def test_the_second_is_told_who_has_it(holder):
    folder, process = holder
    with (
        pytest.raises(InUseError, match=rf"is in use by process {process.pid} on \S+; wait for it or end it"),
        locked(folder),
    ):
        pytest.fail("two processes were let in")


def test_a_killed_holder_leaves_it_free(holder):
    folder, process = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    with locked(folder):
        assert (folder / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    with locked(folder):
        pass


def test_a_folder_that_cannot_be_written_is_used_without(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refused)
    with locked(tmp_path):
        pass


def test_a_run_that_another_process_does_is_left_to_it(tmp_path, monkeypatch):
    """By the command and by a sweep's worker; nothing of the other process's folder changes."""
    task = runs.lay_out_task(tmp_path / "task")
    command = runs.overrides(task, tmp_path / "out")
    cfg = runs.compose_train(command)
    folder = make_plan(cfg).folder
    folder.mkdir(parents=True)
    with held(folder):
        for more in ((), ("resume=false",)):
            with pytest.raises(InUseError, match="is in use by process"):
                runs.run([*command, *more])
        outcome = run(Assignment(cfg, command, folder), Kept())
        assert outcome.record is None and "is in use by process" in outcome.error and not outcome.last
        assert outcome.elsewhere  # which is no failure
        assert [file.name for file in folder.iterdir()] == [LOCK_FILE] and not (folder / FAILURE_FILE).exists()
    assert runs.run(command).accuracy > 0
