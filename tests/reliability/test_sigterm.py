"""Slurm's preemption: SIGTERM saves and ends with a code of its own; the same command goes on to the same weights."""

import os
import signal
import sys
import time

import pytest
import torch
from helpers import crashes, faults, runs

from mambapeft_vision.results.layout import CHECKPOINT_FILE
from mambapeft_vision.run.exit import PREEMPTED
from mambapeft_vision.utils.errors import Preempted


def test_the_epoch_under_way_is_the_last_and_is_saved(task, tmp_path):
    rare = "trainer.checkpoint_every_s=1000"  # no checkpoint but the one that SIGTERM makes
    runs.run(runs.overrides(task, tmp_path / "whole", rare))
    command = runs.overrides(task, tmp_path / "parts", rare)
    before = signal.getsignal(signal.SIGTERM)
    told = faults.InStep(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="terminated after epoch 2 of 5, which is saved"):
        runs.run(command, told)
    assert signal.getsignal(signal.SIGTERM) is before
    folder = runs.only_run_folder(tmp_path / "parts")
    assert (folder / CHECKPOINT_FILE).is_file() and len(runs.read_metrics(folder)) == 2
    runs.run(command)
    whole = runs.read_adapter_tensors(runs.only_run_folder(tmp_path / "whole"))
    parts = runs.read_adapter_tensors(folder)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_requeue_in_the_middle_of_training_passes_with_its_code(task, tmp_path):
    """Submitit answers a cluster's signal so, from its signal handler; the requeued job is the same command."""
    command = runs.overrides(task, tmp_path)
    with pytest.raises(SystemExit) as end:
        runs.run(command, faults.InStep(5, lambda: sys.exit(144)))
    assert end.value.code == 144
    assert len(runs.read_metrics(runs.only_run_folder(tmp_path))) == 1
    assert runs.run(command).epochs == 5


def test_the_command_ends_with_its_own_code(task, tmp_path):
    command = runs.overrides(task, tmp_path, "trainer.max_epochs=100000", "trainer.checkpoint_every_s=1000")
    begun = crashes.begin(tmp_path, "train.py", *command)
    while not list(tmp_path.glob("*/*/*/*/metrics.csv")):
        assert begun.process.is_alive(), begun.end()
        time.sleep(0.01)
    begun.process.terminate()
    code, _, err = begun.end()
    assert code == PREEMPTED == 143
    assert "which is saved; the same command continues" in err
    assert (runs.only_run_folder(tmp_path) / CHECKPOINT_FILE).is_file()
