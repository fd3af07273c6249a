"""Too little memory, a GPU that fails, workers that die: the run ends with its cause, and the sweep goes on."""

import json
import os
import signal

import pytest
import torch
from helpers import crashes, faults, runs

from mambapeft_vision.data import loaders, module
from mambapeft_vision.engine.step import TrainStep
from mambapeft_vision.results.layout import CHECKPOINT_FILE, FAILURE_FILE
from mambapeft_vision.run import finish
from mambapeft_vision.utils.errors import UserError

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 9.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.25 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)


def goes_on(command, folder):
    """The same command continues from the checkpoint, which is there."""
    assert (folder / CHECKPOINT_FILE).is_file()
    assert runs.run(command).accuracy > 0
    assert (folder / "train.log").read_text().count("continues from") == 1


def test_out_of_memory_says_how_much_and_what_to_lower(task, tmp_path):
    command = runs.overrides(task, tmp_path, "trainer.max_epochs=2")
    with pytest.raises(UserError) as caught:
        runs.run(command, faults.raises(torch.OutOfMemoryError(OUT_OF_MEMORY), 5))
    message = str(caught.value)
    assert "lora_p_x on custom/tiny needs more memory than the GPU has" in message
    assert "Tried to allocate 9.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.25 GiB is free" in message
    assert "trainer.micro_batch (now 16 images a pass)" in message and "dataset.batch_size (now 16)" in message
    assert "PYTORCH_ALLOC_CONF" not in message
    folder = runs.only_run_folder(tmp_path)
    assert json.loads((folder / FAILURE_FILE).read_text())["error"].startswith("lora_p_x on custom/tiny needs more")
    goes_on(command, folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, which is not here")
def test_out_of_memory_on_a_gpu(task, tmp_path):
    """A real one; with the memory back the same command does the run, in the same process."""
    command = runs.overrides(task, tmp_path, "trainer.max_epochs=2", "trainer.device=cuda")
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(UserError, match=r"needs more memory than the GPU has: .*Tried to allocate .*Lower trainer"):
            runs.run(command)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert runs.run(command).accuracy > 0


def test_out_of_memory_in_the_test(task, tmp_path, monkeypatch):
    def predict(*arguments, **options):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    command = runs.overrides(task, tmp_path, "trainer.max_epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr(finish, "predict", predict)
        with pytest.raises(UserError, match=r"if it was testing, dataset\.test_batch_size \(now 256\)"):
            runs.run(command)
    goes_on(command, runs.only_run_folder(tmp_path))


def test_a_gpu_that_fails_ends_the_run_with_its_cause(task, tmp_path, monkeypatch):
    """What giving its memory back then says is not the cause."""
    command = runs.overrides(task, tmp_path, "trainer.max_epochs=2")
    lost = RuntimeError("CUDA error: unspecified launch failure")
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "release", lambda self: torch.tensor([1]).view(3))
        with pytest.raises(RuntimeError, match="CUDA error: unspecified launch failure") as caught:
            runs.run(command, faults.raises(lost, 5))
    assert caught.value is lost
    folder = runs.only_run_folder(tmp_path)
    failure = json.loads((folder / FAILURE_FILE).read_text())
    assert failure["error"] == "RuntimeError: CUDA error: unspecified launch failure"
    assert "in act" in failure["traceback"] and failure["overrides"] == command
    goes_on(command, folder)


FAILING_METHOD = """
from mambapeft_vision.methods.linear_probe import LinearProbe


class Failing(LinearProbe):
    def __init__(self, *, error: str) -> None:
        super().__init__()
        self.error = error

    def attach(self, model):
        super().attach(model)
        if self.error != "none":
            model.register_forward_hook(self.fail)

    def fail(self, *_):
        raise RuntimeError(f"CUDA error: {self.error}")
"""


@pytest.mark.parametrize("way", ["train.py", "scripts/sweep_vtab1k.py"])
def test_the_sweep_goes_on(task, tmp_path, way):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "failing.py").write_text(FAILING_METHOD)
    code, out, err = crashes.command(
        tmp_path,
        way,
        *(["-m"] if way == "train.py" else []),
        *[text for text in runs.overrides(task, tmp_path / "out", "trainer.max_epochs=1") if "lora" not in text],
        "method=linear_probe",
        f"paths.methods={tmp_path / 'methods'}",
        "+method.failing._target_=mambapeft_vision.methods.failing.Failing",
        "+method.failing.error=the GPU has fallen off the bus,none",
    )
    assert code == 1 and "1 of the runs failed" in out + err
    (failure,) = (tmp_path / "out").rglob(FAILURE_FILE)
    content = json.loads(failure.read_text())
    assert content["error"] == "RuntimeError: CUDA error: the GPU has fallen off the bus"
    assert content["kind"] == "RuntimeError" and "in fail" in content["traceback"]
    (result,) = (tmp_path / "out").rglob("result.json")
    assert result.parent != failure.parent


def test_a_decoding_worker_that_dies_ends_the_run_with_its_cause(task, tmp_path, monkeypatch):
    """The training is kept: the same command only tests."""
    parent = os.getpid()

    def decode_entry(*_):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    more = ("trainer.max_epochs=2", "paths.cache=null", "dataset.num_workers=1")
    command = runs.overrides(task, tmp_path, *more)
    monkeypatch.setattr(module, "KEEP_IN_MEMORY", 0)
    with monkeypatch.context() as patch:
        patch.setattr(loaders, "decode_entry", decode_entry)
        with pytest.raises(RuntimeError, match=r"DataLoader worker.*(killed by signal|exited unexpectedly)"):
            runs.run(command)
    folder = runs.only_run_folder(tmp_path)
    assert "DataLoader worker" in json.loads((folder / FAILURE_FILE).read_text())["error"]
    again = faults.InStep(1, lambda: pytest.fail("it was trained again"))
    assert runs.run(command, again).epochs == 2
