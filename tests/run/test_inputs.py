"""Runs whose images, weights or method files have changed since: never a silent mixture of old and new."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import faults, runs
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mambapeft_vision.adapter.files import ADAPTER_FILE, CONFIG_FILE, read_adapter
from mambapeft_vision.engine.checkpoint import AtomicCheckpointIO
from mambapeft_vision.results.layout import CHECKPOINT_FILE
from mambapeft_vision.results.record import read_record
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.run.inputs import CONTENT, OWN_METHODS, Fingerprints, changed
from mambapeft_vision.utils.errors import UserError

SHORT = ("trainer.max_epochs=2", "paths.cache=null")
METHOD = """
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.own_size import RANK

class Own(LoRA):
    def __init__(self) -> None:
        super().__init__(targets="in_proj", rank=RANK)
"""


@pytest.fixture
def task(tmp_path):
    return runs.lay_out_task(tmp_path / "task")


def relabel(task: Path, split: str) -> None:
    file = task / f"{split}.txt"
    lines = [line.split() for line in file.read_text().splitlines()]
    file.write_text("".join(f"{path} {(int(label) + 1) % runs.CLASSES}\n" for path, label in lines))


def repaint(task: Path, split: str) -> None:
    """Other pixels in files of the same names and sizes."""
    for file in sorted((task / "images" / split).iterdir()):
        with Image.open(file) as image:
            pixels = np.asarray(image)
        Image.fromarray(255 - pixels).save(file, compress_level=0)


CHANGES = {"labels": relabel, "pixels": repaint}


def interrupted(command: list[str]) -> Path:
    """A run that ended in its second epoch; returns its folder."""
    with pytest.raises(RuntimeError, match="interrupted"):
        runs.run(command, faults.raises(RuntimeError("interrupted"), 5))
    (file,) = Path(command[-1].partition("=")[2]).rglob(CHECKPOINT_FILE)
    return file.parent


def command_of(task: Path, outputs: Path) -> list[str]:
    return [*runs.overrides(task, outputs, *SHORT), f"paths.outputs={outputs}"]


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        (("a", "b", None), ("a", "b", "c"), ""),
        (("a", "b", "c"), (None, None, None), ""),
        (("a", "b", "c"), ("x", "b", "c"), "images"),
        (("a", "b", "c"), ("x", "y", "z"), "images and weights of the backbone and method files"),
        (("a", "b", "c", "d"), ("a", "b", "c", "x"), "images"),
        (("a", "b", "c", "d"), ("x", "b", "c", "x"), "images"),
        (("a", "b", "c"), ("a", "b", "c", "x"), ""),
    ],
)
def test_only_what_both_know_is_compared(then, now, words):
    assert changed(Fingerprints(*then), Fingerprints(*now)) == words


@pytest.mark.parametrize(("change", "split"), [("labels", "test"), ("labels", "train800val200"), ("pixels", "test")])
def test_a_finished_run_on_other_images_is_set_aside_and_done_again(task, tmp_path, capsys, change, split):
    repaint(task, split)
    command = command_of(task, tmp_path / "out")
    first = runs.run(command)
    CHANGES[change](task, split)
    again = runs.run(command)
    assert (again.data_manifest == first.data_manifest) == (change == "pixels")
    assert again.versions[CONTENT] != first.versions[CONTENT] or change == "labels"
    assert again.loss != first.loss
    assert "made from other images" in capsys.readouterr().out
    folder = runs.only_run_folder(tmp_path / "out")
    assert read_record(folder.with_name(f"{folder.name}.replaced-1")) == first
    runs.run(command)
    assert "was finished before" in capsys.readouterr().out


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_other_images_is_set_aside(task, tmp_path, capsys, change):
    repaint(task, "train800val200")
    folder = interrupted(command_of(task, tmp_path / "out"))
    CHANGES[change](task, "train800val200")
    resumed = runs.run(command_of(task, tmp_path / "out"))
    assert f"{folder / CHECKPOINT_FILE} was made from other images" in capsys.readouterr().out
    assert folder.with_name(f"{folder.name}.replaced-1").joinpath(CHECKPOINT_FILE).is_file()
    whole = runs.run(command_of(task, tmp_path / "whole"))
    assert (resumed.loss, resumed.train_loss, resumed.epochs) == (whole.loss, whole.train_loss, whole.epochs)


def test_a_checkpoint_of_other_weights_is_set_aside(task, tmp_path, capsys):
    command = command_of(task, tmp_path / "out")
    command.insert(0, "backbone.weights=random")
    interrupted(command)
    checkpoint = next((tmp_path / "out").rglob(CHECKPOINT_FILE))
    content = AtomicCheckpointIO().load_checkpoint(checkpoint)
    content["inputs"]["weights"] = "0" * 64
    AtomicCheckpointIO().save_checkpoint(content, checkpoint)
    runs.run(command)
    assert "was made from other weights of the backbone" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_checkpoint_with_one_other_bit_is_noticed(tmp_path, place):
    content = {"epoch": 1, "global_step": 3, "loops": {}, "state_dict": {"a": torch.randn(500)}, "optimizer_states": []}
    file = tmp_path / CHECKPOINT_FILE
    AtomicCheckpointIO().save_checkpoint(content, file)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(file)["state_dict"]["a"], content["state_dict"]["a"])
    damaged = bytearray(file.read_bytes())
    damaged[int(place * len(damaged))] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"checkpoint\.ckpt.*not as it was written.*delete it"):
        AtomicCheckpointIO().load_checkpoint(file)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(5_000)])
def test_a_run_begins_afresh_where_its_checkpoint_is_damaged(task, tmp_path, capsys, content):
    folder = interrupted(command_of(task, tmp_path / "out"))
    (folder / CHECKPOINT_FILE).write_bytes(content)
    resumed = runs.run(command_of(task, tmp_path / "out"))
    assert "is damaged or no checkpoint of this run" in capsys.readouterr().out
    assert resumed.epochs == 2 and len(runs.read_metrics(folder)) == 2


def test_a_run_on_some_of_the_images_is_found_again(task, tmp_path, capsys):
    command = [*command_of(task, tmp_path / "out"), "dataset.shots=2"]
    runs.run(command)
    runs.run(command)
    assert "was finished before" in capsys.readouterr().out


def test_more_epochs_are_a_run_of_their_own_which_says_so(task, tmp_path, capsys):
    command = [*command_of(task, tmp_path / "out"), "trainer.max_epochs=1", "trainer.warmup_epochs=0"]
    runs.run(command)
    folder = runs.only_run_folder(tmp_path / "out")
    assert "another number of epochs" not in capsys.readouterr().out
    assert runs.run([*command, "trainer.max_epochs=2"]).epochs == 2
    assert f"{folder} holds these settings with another number of epochs" in capsys.readouterr().out
    assert read_record(folder).epochs == 1


def test_method_files_of_ones_own_count(task, tmp_path, capsys):
    code = tmp_path / "code"
    code.mkdir()
    (code / "own_size_test.py").write_text("RANK = 2\n")
    (code / "own_test.py").write_text(METHOD.replace("own_size", "own_size_test"))
    (code / "other.py").write_text("")
    command = [word for word in command_of(task, tmp_path / "out") if not word.startswith("method.")]
    own = "+method.own._target_=mambapeft_vision.methods.own_test.Own"
    command = ["method=linear_probe", own, f"paths.methods={code}", *command]
    first = runs.run(command)
    assert len(first.versions[OWN_METHODS]) == 64
    (code / "other.py").write_text("unrelated = 1")
    runs.run(command)
    assert "was finished before" in capsys.readouterr().out
    (code / "own_size_test.py").write_text("RANK = 2  # imported by the method\n")
    again = runs.run(command)
    assert again.versions[OWN_METHODS] != first.versions[OWN_METHODS]
    assert "made from other method files" in capsys.readouterr().out


# Testing again


@pytest.fixture
def finished(task, tmp_path):
    runs.run(command_of(task, tmp_path / "out"))
    return runs.only_run_folder(tmp_path / "out")


def evaluated(folder: Path, *more: str) -> dict[str, object]:
    return evaluate(runs.compose_root("evaluate", [f"run={folder}", "device=cpu", *more]))


@pytest.mark.parametrize("change", CHANGES)
def test_an_evaluation_says_that_the_images_are_others(task, tmp_path, capsys, change):
    repaint(task, "test")
    runs.run(command_of(task, tmp_path / "out"))
    finished = runs.only_run_folder(tmp_path / "out")
    CHANGES[change](task, "test")
    evaluated(finished)
    assert "the images are not those that the run was made from" in capsys.readouterr().out


def test_an_evaluation_needs_the_test_images_alone(task, finished, capsys):
    (task / "train800val200.txt").unlink()
    shutil.rmtree(task / "images" / "train800val200")
    assert evaluated(finished)["accuracy"] == read_record(finished).accuracy
    assert "are not those" not in capsys.readouterr().out


@pytest.mark.parametrize("where", [0.4, 0.6, 0.8, 0.99])
def test_a_damaged_adapter_is_refused(finished, where):
    file = finished / ADAPTER_FILE
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter\.safetensors.*copy it again"):
        read_adapter(finished)


def test_zeroed_blocks_of_an_adapter_are_refused(finished):
    file = finished / ADAPTER_FILE
    content = file.read_bytes()
    file.write_bytes(content[: -len(content) // 3] + bytes(len(content) - len(content[: -len(content) // 3])))
    with pytest.raises(UserError, match="is damaged"):
        evaluated(finished)


def test_a_config_that_is_not_the_adapters_is_told_of(finished):
    """One digit of a method's sizes would make other predictions; what is only shown may be changed."""
    file = finished / CONFIG_FILE
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read_adapter(finished)
        file.write_text(file.read_text().replace('"task": "', '"task": "renamed ', 1))
        read_adapter(finished)
    assert said == []
    (name, spec), *_ = read_adapter(finished).config["methods"].items()
    config = json.loads(file.read_text())
    config["methods"][name]["scale"] = 10 * spec.get("scale", 1)
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"adapter_config.json is not as it was saved .* damaged or changed by hand"):
        read_adapter(finished)


def test_tensors_that_somebody_changed_on_purpose_are_read(finished):
    """Cast and saved by other tools, which know of no checksum."""
    tensors = load_file(finished / ADAPTER_FILE)
    with safe_open(finished / ADAPTER_FILE, "pt") as file:
        assert len(file.metadata()["tensors_sha256"]) == 64
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, finished / ADAPTER_FILE)
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_adapter(finished).state.values())


def test_another_loss_than_recorded_is_said(finished, capsys):
    """Damage that no checksum covers, as of an adapter of an earlier release."""
    tensors = load_file(finished / ADAPTER_FILE)
    save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, finished / ADAPTER_FILE)
    evaluated(finished)
    assert "differ by more than rounding" in capsys.readouterr().out
