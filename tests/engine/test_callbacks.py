"""The order of a run's callbacks."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mambapeft_vision.engine.callbacks import (
    Checkpoints,
    History,
    ProgressLine,
    StopAtNonFinite,
    StopAtSigterm,
    WarmupPhases,
    callbacks_of_a_run,
)
from mambapeft_vision.engine.device import resolve_device
from mambapeft_vision.engine.loop import make_trainer
from mambapeft_vision.engine.module import FineTuning
from mambapeft_vision.pretraining.callbacks import Length, Report, Validation, callbacks_of_pretraining
from mambapeft_vision.utils.console import Console

# What must come before what; `callbacks_of_a_run` says why.
BEFORE = [
    (StopAtNonFinite, History),
    (StopAtNonFinite, Checkpoints),
    (History, ProgressLine),
    (WarmupPhases, Checkpoints),
    (Checkpoints, StopAtSigterm),
]
BEFORE_IN_PRETRAINING = [(Length, Report), (Report, Validation), (Report, Checkpoints), (Checkpoints, StopAtSigterm)]


def kinds_in_trainer(callbacks) -> list[type]:
    """Lightning moves callbacks of some kinds to the end."""
    trainer = make_trainer(resolve_device("cpu"), callbacks, max_epochs=1)
    return [type(callback) for callback in trainer.callbacks]


def test_callbacks_of_a_run_are_called_in_the_stated_order():
    kinds = kinds_in_trainer(
        callbacks_of_a_run(
            task="a task",
            methods="a method",
            checkpoint=Path("checkpoint.ckpt"),
            checkpoint_every_s=0,
            inputs={},
            ends_sweep=True,
            history=History(Path("metrics.csv"), print),
            console=Console(stream=io.StringIO()),
        )
    )
    assert all(kinds.index(first) < kinds.index(second) for first, second in BEFORE)
    assert set(kinds) == {kind for pair in BEFORE for kind in pair}


def test_callbacks_of_pretraining_are_called_in_the_stated_order():
    kinds = kinds_in_trainer(callbacks_of_pretraining(Path("checkpoint"), 0, print))
    assert all(kinds.index(first) < kinds.index(second) for first, second in BEFORE_IN_PRETRAINING)
    assert set(kinds) == {kind for pair in BEFORE_IN_PRETRAINING for kind in pair}


class OfTwoSteps(FineTuning):
    """A module of which an epoch's end asks its step and its model."""

    steps_per_epoch = 2

    def __init__(self, step: object, model: object) -> None:
        vars(self).update(in_use=step, model=model)

    @property
    def step(self) -> object:
        return self.in_use


@pytest.mark.parametrize("warming_up", [False, True])
def test_an_epoch_waits_for_its_steps_once_and_launches_its_last_check_before(warming_up, monkeypatch):
    """But after a warm-up's last batch, before the step that knows of a failure is replaced."""
    happened = []

    def failed(wait=False):
        happened.append("waited" if wait else "looked")
        return False

    def norms(tensors, order):
        happened.append("launched")
        return [torch.ones(()) for _ in tensors]

    monkeypatch.setattr(torch, "_foreach_norm", norms)
    methods = {"m": SimpleNamespace(warming_up=warming_up)}
    model = SimpleNamespace(methods=methods, trained=lambda: {"weight": torch.ones(2)})
    module = OfTwoSteps(SimpleNamespace(failed=failed), model)
    callback = StopAtNonFinite("task", "method", Path("checkpoint.ckpt"), ends_sweep=True)
    for number in range(2):
        callback.on_train_batch_end(None, module, None, None, number)
    callback.on_train_epoch_end(None, module)
    assert happened == ["looked", "waited" if warming_up else "looked", "launched", "waited"]
