"""A run from command to folder, continued, repeated, stopped and tested again."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import faults, runs
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from mambapeft_vision.engine.checkpoint import AtomicCheckpointIO
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.results.layout import CHECKPOINT_FILE
from mambapeft_vision.results.record import read_record
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.utils.errors import UserError


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def interrupted_at(batch: int) -> faults.InStep:
    """Lets the training batch with this number (from 1) raise."""
    return faults.raises(RuntimeError("interrupted by the test"), batch)


# What a run leaves


def test_run_folder_holds_everything(finished):
    names = {file.name for file in finished.folder.iterdir()}
    assert names >= {
        "config.yaml",
        "overrides.yaml",
        "adapter.safetensors",
        "adapter_config.json",
        "metrics.csv",
        "train.log",
        "result.json",
        "predictions.npz",
        "predictions.png",
        "curves.png",
        "confusion.png",
    }
    assert CHECKPOINT_FILE not in names
    assert not [name for name in names if name.endswith(".tmp")]


def test_task_is_learned_and_record_agrees_with_predictions(finished):
    record = read_record(finished.folder)
    assert record == finished.record
    with np.load(finished.folder / "predictions.npz") as file:
        predicted, labels = file["predicted"], file["labels"]
    assert predicted.dtype == labels.dtype == np.int64 and len(labels) == runs.TEST_IMAGES
    assert record.accuracy == (predicted == labels).mean() > 0.6
    assert record.num_test == runs.TEST_IMAGES


def test_record_counts_trained_numbers_with_the_head_apart(finished):
    lora = 2 * (4 * 32 + 64 * 4)  # two layers; down [4, 32], up [64, 4] on the X half of in_proj
    assert finished.record.trainable == lora
    assert finished.record.trainable_by_method == {"lora_p_x": lora}
    assert finished.record.head == 32 * 3 + 3


def test_record_tells_what_it_was_made_from(finished):
    record = finished.record
    assert record.task == "custom/tiny" and record.group == "custom" and record.methods == ["lora_p_x"]
    assert record.backbone == "vim_pico_patch8_32" and re.fullmatch("[0-9a-f]{64}", record.backbone_sha256)
    assert record.kernel != "auto" and record.device == "cpu" and record.precision == "fp32"
    assert record.versions.keys() >= {"torch", "lightning", "python", "mambapeft-vision"}
    assert record.peak_memory_bytes > 2**20 and record.train_images_per_second > 0
    assert 0 < record.train_seconds < record.wall_seconds
    assert record.data_manifest.startswith("unverified:")
    assert record.unmerged == {}


def test_config_is_resolved_and_overrides_are_kept(finished):
    config = OmegaConf.load(finished.folder / "config.yaml")
    assert OmegaConf.to_container(config) == finished.record.config
    assert config.dataset.seed == 0
    assert list(OmegaConf.load(finished.folder / "overrides.yaml")) == finished.command


def test_metrics_have_one_row_an_epoch(finished):
    rows = runs.read_metrics(finished.folder)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3, 4]
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12, 15]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["loss"]) == finished.record.train_loss


def test_without_learning_the_loss_is_that_of_guessing(task, tmp_path):
    """The head starts at zero."""
    still = ["trainer.learning_rate=0", "trainer.min_lr=0", "trainer.warmup_epochs=0", "trainer.max_epochs=1"]
    record = runs.run(runs.overrides(task, tmp_path, *still))
    assert record.train_loss == pytest.approx(np.log(3), rel=1e-6) and record.loss == pytest.approx(np.log(3), rel=1e-6)


@pytest.mark.parametrize("name", ["predictions", "curves", "confusion"])
def test_pictures_are_images(finished, name):
    with Image.open(finished.folder / f"{name}.png") as image:
        image.load()
        assert image.width > 500


def test_the_log_has_a_line_an_epoch(finished):
    lines = (finished.folder / "train.log").read_text().splitlines()
    epochs = [
        line for line in lines if re.match(r"epoch \d/5  loss \d\.\d{4}  accuracy [\d.]+%  [\d,]+ images/s", line)
    ]
    assert len(epochs) == 5


# The same command again


def test_a_finished_run_is_not_repeated(finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.folder.iterdir()}
    record = runs.run(finished.command)
    assert record == finished.record
    assert {file: file.stat().st_mtime_ns for file in finished.folder.iterdir()} == before
    out = capsys.readouterr().out
    assert f"{record.accuracy:.2%}" in out and "resume=false" in out


def test_resume_false_keeps_the_old_run_aside(task, tmp_path):
    command = runs.overrides(task, tmp_path, "trainer.max_epochs=1")
    first = runs.run(command)
    second = runs.run([*command, "resume=false"])
    folder = runs.only_run_folder(tmp_path)
    aside = folder.with_name(f"{folder.name}.replaced-1")
    assert read_record(aside) == first and read_record(folder) == second
    assert_same_tensors(runs.read_adapter_tensors(aside), runs.read_adapter_tensors(folder))


@pytest.mark.parametrize("batch", [1, 5, 9, 14])
def test_an_interrupted_run_continues_to_the_same_bits(finished, task, tmp_path, batch):
    command = runs.overrides(task, tmp_path, "trainer.picture=true")
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        runs.run(command, interrupted_at(batch))
    folder = runs.only_run_folder(tmp_path)
    assert (folder / CHECKPOINT_FILE).exists() == (batch > 3)
    record = runs.run(command)
    assert_same_tensors(runs.read_adapter_tensors(folder), runs.read_adapter_tensors(finished.folder))
    assert (record.accuracy, record.loss) == (finished.record.accuracy, finished.record.loss)
    losses = [[row["loss"] for row in runs.read_metrics(place)] for place in (folder, finished.folder)]
    assert losses[0] == losses[1]


def test_a_run_interrupted_in_the_test_is_not_trained_again(finished, task, tmp_path, monkeypatch):
    command = runs.overrides(task, tmp_path, "trainer.picture=true")
    with monkeypatch.context() as patch:
        patch.setattr("mambapeft_vision.run.finish.test", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.run(command)
    record = runs.run(command, interrupted_at(1))
    assert (record.accuracy, record.loss) == (finished.record.accuracy, finished.record.loss)
    assert record.epochs == 5


def test_order_of_methods_does_not_change_the_run(task, tmp_path):
    both = [
        make_plan(runs.compose_train([f"method=[{names}]", *runs.overrides(task, tmp_path)]))
        for names in ("lora_p_x,linear_probe", "linear_probe,lora_p_x")
    ]
    assert both[0].folder == both[1].folder


@pytest.mark.parametrize(
    "change, same",
    [
        ("paths.data=elsewhere", True),
        ("logger=wandb", True),
        ("trainer.checkpoint_every_s=7", True),
        ("seed=1", False),
        ("method.lora_p_x.rank=8", False),
        ("trainer.max_epochs=6", False),
        ("dataset.batch_size=8", False),
        ("backbone.weights=weights.pth", False),
    ],
)
def test_the_fingerprint_covers_what_decides_the_result(task, tmp_path, change, same):
    def plan(*more: str) -> RunPlan:
        return make_plan(runs.compose_train(runs.overrides(task, tmp_path, *more)))

    assert (plan(change).fingerprint == plan().fingerprint) == same


def test_the_fingerprint_does_not_depend_on_where_the_data_is():
    plans = [make_plan(runs.compose_train([f"paths.data={place}"])) for place in ("data", "elsewhere")]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert plans[0].config["dataset"]["folder"] != plans[1].config["dataset"]["folder"]


# Stopping


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(finished, task, tmp_path, monkeypatch):
    command = runs.overrides(task, tmp_path, "trainer.picture=true")
    calls = 0
    original = Normalise.forward

    def poisoned(self, images):
        nonlocal calls
        calls += 1
        return original(self, images) * (float("nan") if calls >= 8 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Normalise, "forward", poisoned)
        with pytest.raises(UserError) as caught:
            runs.run(command)
    message = str(caught.value)
    assert "step 7 (epoch 3) of lora_p_x on custom/tiny" in message
    assert re.search(r"largest gradient norm: nan in (head|lora_p_x\.layers\.\d\.mixer\.in_proj\.weight)", message)
    folder = runs.only_run_folder(tmp_path)
    assert str(folder / CHECKPOINT_FILE) in message
    assert len(runs.read_metrics(folder)) == 2
    assert "the loss is nan" in (folder / "train.log").read_text()

    runs.run(command)
    assert_same_tensors(runs.read_adapter_tensors(folder), runs.read_adapter_tensors(finished.folder))


def test_checkpoint_holds_no_frozen_weight_and_runs_no_code(task, tmp_path):
    command = runs.overrides(task, tmp_path)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        runs.run(command, interrupted_at(5))
    checkpoint = runs.only_run_folder(tmp_path) / CHECKPOINT_FILE
    content = torch.load(checkpoint, weights_only=True)
    sites = [f"lora_p_x.layers.{i}.mixer.in_proj.weight.{matrix}" for i in (0, 1) for matrix in ("down", "up")]
    assert set(content["state_dict"]) == {*sites, "head.weight", "head.bias"}
    assert checkpoint.stat().st_size < 100_000

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Evil()}, checkpoint)
    with pytest.raises(UserError, match="delete it"):
        AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=False)
    assert not (tmp_path / "executed").exists()


def test_checkpoints_are_at_most_as_frequent_as_asked(task, tmp_path, monkeypatch):
    """With a long interval, an interrupted run has none yet; the last epoch always leaves one."""
    command = runs.overrides(task, tmp_path, "trainer.checkpoint_every_s=1000")
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        runs.run(command, interrupted_at(14))
    assert not (runs.only_run_folder(tmp_path) / CHECKPOINT_FILE).exists()
    monkeypatch.setattr("mambapeft_vision.run.finish.test", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs.run(command)
    assert (runs.only_run_folder(tmp_path) / CHECKPOINT_FILE).exists()


# Other settings


def test_clipping_can_be_switched_off(task, tmp_path):
    clipped, free = (
        runs.run(runs.overrides(task, tmp_path, "trainer.max_epochs=1", f"trainer.clip_norm={norm}"))
        for norm in ("1e-4", "null")
    )
    assert clipped.loss != free.loss


def test_bf16_runs_close_to_fp32(finished, task, tmp_path):
    record = runs.run(runs.overrides(task, tmp_path, "trainer.precision=bf16"))
    assert record.precision == "bf16"
    losses = [
        [float(row["loss"]) for row in runs.read_metrics(f)] for f in (finished.folder, runs.only_run_folder(tmp_path))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert record.loss == pytest.approx(finished.record.loss, rel=5e-3) and record.loss != finished.record.loss


METHOD_WITH_WARMUP = '''
import torch
from torch import nn
from mambapeft_vision.methods.method import Method

class TwoPhases(Method):
    """Trains a number that does nothing for some steps, then another one."""

    warmup_steps = 4

    def attach(self, model):
        self.first = nn.Parameter(torch.zeros(1))
        self.handle = model.head.register_forward_hook(lambda _, __, out: out + 0 * sum(self.owned().values()))

    @property
    def warming_up(self):
        return hasattr(self, "first")

    def finish_warmup(self):
        del self.first
        self.second = nn.Parameter(torch.zeros(2).sum(0, keepdim=True))
        return "the second phase begins"

    def enter_phase_of(self, saved):
        if "second" in saved and self.warming_up:
            self.finish_warmup()
'''


def test_a_method_of_ones_own_with_a_warmup_phase(task, tmp_path):
    (tmp_path / "two_phases.py").write_text(METHOD_WITH_WARMUP)
    spec = "+method.two={_target_: mambapeft_vision.methods.two_phases.TwoPhases}"
    command = runs.overrides(task, tmp_path / "outputs", spec, f"paths.methods={tmp_path}")
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        runs.run(command, interrupted_at(8))
    runs.run(command)
    folder = runs.only_run_folder(tmp_path / "outputs")
    assert "two.second" in runs.read_adapter_tensors(folder)
    assert (folder / "train.log").read_text().count("two: the second phase begins") == 1

    with pytest.raises(UserError, match=r"warms up for 4 steps, but the run has 3"):
        runs.run([*command, "trainer.max_epochs=1"])


# Testing again


def evaluate_run(folder: Path, *more: str) -> dict:
    return evaluate(runs.compose_root("evaluate", [f"run={folder}", "device=cpu", *more]))


def test_evaluation_gives_the_recorded_accuracy(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "moved")
    evaluation = evaluate_run(folder)
    assert evaluation["accuracy"] == evaluation["recorded_accuracy"] == finished.record.accuracy
    assert evaluation["loss"] == finished.record.loss
    assert json.loads((folder / "evaluation.json").read_text()) == evaluation


def test_evaluation_finds_images_that_moved(finished, task, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    moved = shutil.copytree(task, tmp_path / "images")
    config = OmegaConf.load(folder / "config.yaml")
    config.dataset.folder = "nowhere"
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(UserError, match="nowhere"):
        evaluate_run(folder)
    assert evaluate_run(folder, f"dataset_folder={moved}")["accuracy"] == finished.record.accuracy


def test_evaluation_refuses_what_is_no_finished_run(finished, tmp_path):
    with pytest.raises(UserError, match=r"result\.json cannot be read"):
        evaluate_run(tmp_path)
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    (folder / "config.yaml").write_text("trainer: {max_epoch: 3}\n")
    with pytest.raises(UserError, match=r"config\.yaml is no config of a run.*max_epoch"):
        evaluate_run(folder)


def test_a_runs_config_cannot_name_code_elsewhere(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    config = OmegaConf.load(folder / "config.yaml")
    config.backbone["_target_"] = "os.system"
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(UserError, match=r"backbone\._target_='os\.system'; expected"):
        evaluate_run(folder)
