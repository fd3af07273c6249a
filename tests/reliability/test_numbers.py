"""NaN and infinity, wherever they come from: the run ends at once, says where, and keeps the last good state."""

import dataclasses
import json
import re

import pytest
import torch
from helpers import crashes, faults, runs
from safetensors.torch import load_file, save_file

from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.backbones.weights import export_official
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.results.layout import CHECKPOINT_FILE, FAILURE_FILE
from mambapeft_vision.run import finish
from mambapeft_vision.run.build import build_backbone
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.utils.errors import NotFiniteError, UserError

EPOCHS = "trainer.max_epochs=3"  # of three steps each


def test_a_gradient_that_is_not_finite_ends_the_run(task, tmp_path, whole):
    """Step, task, method, module; the last good checkpoint, from which the same command goes on to the same weights."""

    def poison(module):
        module.model.head_parameters()["head.weight"].grad[0, 0] = float("inf")

    command = runs.overrides(task, tmp_path, EPOCHS)
    with pytest.raises(NotFiniteError) as caught:
        runs.run(command, faults.Gradients(5, poison))
    message = str(caught.value)
    assert "the gradient is not finite" in message
    assert "in step 4 (epoch 2) of lora_p_x on custom/tiny; largest gradient norm: inf in head" in message
    folder = runs.only_run_folder(tmp_path)
    assert f"{folder / CHECKPOINT_FILE} is the last good state" in message
    failure = json.loads((folder / FAILURE_FILE).read_text())
    assert failure["kind"] == "NotFiniteError" and failure["error"] == message
    runs.run(command)
    one, two = runs.read_adapter_tensors(folder), runs.read_adapter_tensors(whole)
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not (folder / FAILURE_FILE).exists()


@pytest.mark.parametrize("step", [5, 6])
def test_weights_that_an_update_throws_out_of_range_are_never_saved(task, tmp_path, whole, step):
    """They are seen in the next step (5) or, after an epoch's last one (6), before the epoch is counted and saved."""

    def overflow(module):
        next(iter(module.model.methods["lora_p_x"].owned().values())).data.view(-1)[0] = float("inf")

    command = runs.overrides(task, tmp_path, EPOCHS)
    with pytest.raises(NotFiniteError, match=r"weights are not finite \(lora_p_x\.layers.* in step 5 \(epoch 2"):
        runs.run(command, faults.AfterStep(step, overflow))
    folder = runs.only_run_folder(tmp_path)
    assert len(runs.read_metrics(folder)) == 1
    assert all(t.isfinite().all() for t in torch.load(folder / CHECKPOINT_FILE)["state_dict"].values())
    runs.run(command)
    one, two = runs.read_adapter_tensors(folder), runs.read_adapter_tensors(whole)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_an_input_that_is_not_finite_is_named(task, tmp_path, monkeypatch):
    original = Normalise.forward
    monkeypatch.setattr(Normalise, "forward", lambda self, images: original(self, images) / 0)
    with pytest.raises(NotFiniteError, match=r"the input is not finite, and so the loss is nan in step 0 \(epoch 1\)"):
        runs.run(runs.overrides(task, tmp_path, EPOCHS))


def test_a_test_loss_that_is_not_finite_is_no_result(task, tmp_path, monkeypatch):
    original = finish.predict

    def predict(*arguments, **options):
        return dataclasses.replace(original(*arguments, **options), loss=float("nan"))

    monkeypatch.setattr(finish, "predict", predict)
    with pytest.raises(NotFiniteError, match="the test loss of lora_p_x on custom/tiny is nan"):
        runs.run(runs.overrides(task, tmp_path, "trainer.max_epochs=1"))
    assert not (runs.only_run_folder(tmp_path) / "result.json").exists()


def test_pretrained_weights_with_nan_are_refused(task, tmp_path):
    file = tmp_path / "weights.safetensors"
    export_official(build_backbone(make_plan(runs.compose_train(runs.overrides(task, tmp_path)))), file)
    state = load_file(file)
    state["layers.1.mixer.out_proj.weight"][0, :3] = float("nan")
    save_file(state, file)
    with pytest.raises(
        UserError, match=r"weights\.safetensors: NaN or infinity in layers\.1\.mixer\.out_proj\.weight \(3 "
    ):
        runs.run(runs.overrides(task, tmp_path, f"backbone.weights={file}"))


def test_an_adapter_with_infinity_is_refused(whole, tmp_path):
    for file in ("adapter_config.json", "adapter.safetensors"):
        (tmp_path / file).write_bytes((whole / file).read_bytes())
    state = load_file(tmp_path / "adapter.safetensors")
    state["head.bias"][1] = float("-inf")
    save_file(state, tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match=r"adapter\.safetensors: NaN or infinity in head\.bias \(1 of 3\)"):
        read_adapter(tmp_path)


def test_a_preprocessing_with_nan_is_refused():
    with pytest.raises(UserError, match="std"):
        Preprocessing((8, 8), "bicubic", (0.5,) * 3, (0.5, float("nan"), 0.5))


# Sweeps

DIVERGES = ["trainer.learning_rate=1e30,1e-2", "trainer.warmup_epochs=0", "trainer.clip_norm=null"]


def outcomes(outputs):
    """Learning rates of the runs that have failed and of those that are finished."""
    failed, finished = (
        {float(re.search(r"learning_rate: (\S+)", (file.parent / "config.yaml").read_text())[1]) for file in files}
        for files in (list(outputs.rglob(FAILURE_FILE)), list(outputs.rglob("result.json")))
    )
    return failed, finished


@pytest.mark.parametrize("way", ["train.py", "scripts/sweep_vtab1k.py"])
def test_a_sweep_stops_or_goes_on_as_told(task, tmp_path, way):
    multirun = ["-m"] if way == "train.py" else []
    arguments = runs.overrides(task, tmp_path / "out", EPOCHS, *DIVERGES)
    code, _, err = crashes.command(tmp_path, way, *multirun, *arguments)
    assert code == 2 and outcomes(tmp_path / "out") == ({1e30}, set()), err
    assert "largest gradient norm" in err and "on_nonfinite" in err and "Traceback" not in err
    code, out, err = crashes.command(tmp_path, way, *multirun, *arguments, "trainer.on_nonfinite=skip_run")
    assert code == (2 if way == "train.py" else 1)
    assert "1 of the runs failed" in out + err and ("1e+30" in out or "=1e30" in err)
    assert outcomes(tmp_path / "out") == ({1e30}, {1e-2})


def test_the_key_is_checked_and_no_part_of_a_runs_identity(task, tmp_path):
    plans = [
        make_plan(runs.compose_train(runs.overrides(task, tmp_path, f"trainer.on_nonfinite={value}")))
        for value in ("stop", "skip_run")
    ]
    assert plans[0].folder == plans[1].folder
    with pytest.raises(UserError, match=r"on_nonfinite=go_on; expected one of stop, skip_run"):
        runs.run(runs.overrides(task, tmp_path, "trainer.on_nonfinite=go_on"))
