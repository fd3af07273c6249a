"""Pretraining: configs, sources, augmentation, the loop, and what it writes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import EMBEDDED_WEIGHTS
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.pretraining import augment, checkpoint, command, loop, model, run
from mambapeft_vision.pretraining.config import AugmentConfig, PretrainConfig, SourceConfig, load_config
from mambapeft_vision.pretraining.sources import load_source
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_file

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
TINY = {"embed_dim": 16, "depth": 1, "img_size": 16}


def write_source(file, splits=None, number=24):
    """Two classes: dark images and light ones."""
    contents = []
    for i in range(number):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (40 + 160 * (i % 2),) * 3).save(stream, "PNG")
        contents.append(stream.getvalue())
    arrays = {
        "blob": np.frombuffer(b"".join(contents), np.uint8),
        "offsets": np.cumsum([0, *map(len, contents)]),
        "labels": np.arange(number) % 2,
        "class_names": np.array(["dark", "light"]),
    }
    np.savez(file, **arrays, **({} if splits is None else {"split": np.array(splits)}))
    return str(file)


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    sources = {name: {"path": write_source(tmp_path / f"{name}.npz"), "holdout": 0.25} for name in ("one", "two")}
    return PretrainConfig(
        backbone="vim_nano_patch8_64",
        architecture=TINY,
        sources={name: SourceConfig(**source) for name, source in sources.items()},
        out=str(tmp_path / "out" / "weights"),
        steps=30,
        warmup_steps=3,
        batch_size=8,
        learning_rate=0.01,
        ema=0.8,
        precision="fp32",
        device="cpu",
        workers=1,
        evaluations=2,
    )


# Configs


def test_the_shipped_configs_are_valid(tmp_path):
    nano = load_config(CONFIGS / "vim_nano.yaml", ["minutes=1e-1", "sources.emoji.share=2"])
    assert (nano.minutes, nano.sources["emoji"].share, nano.sources["emoji"].flip) == (0.1, 2.0, 0.0)
    folder = load_config(CONFIGS / "folder.yaml", [f"sources.mine.path={tmp_path}", "augment.jitter=0"])
    assert (folder.steps, folder.minutes, folder.augment.jitter) == (2000, None, 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"sources.mine lacks path"),
        (["sources.mine.path=x", "stepz=3"], r"unknown keys \['stepz'\]"),
        (["sources.mine.path=x", "steps=many"], "steps is 'many': expected int"),
        (["sources.mine.path=x", "steps=2.5"], "steps is 2.5: expected int"),
        (["sources.mine.path=x", "cuda_graph=1"], "cuda_graph is 1: expected bool"),
        (["sources.mine.path=x", "minutes=5"], "give exactly one of them"),
        (["sources.mine.path=x", "precision=fp8"], "expected fp32 or bf16"),
        (["sources.mine"], "expected key=value"),
        (["steps.more=3"], "steps holds the value 2000"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(CONFIGS / "folder.yaml", overrides)


def test_train_py_pretrains_too(config, tmp_path):
    """The same run by both commands: the same weights."""
    images = tmp_path / "images"
    for number in range(24):
        file = images / ("light", "dark")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200 - 160 * (number % 2), number, 0)).save(file)
    settings = [
        *("steps=3", "batch_size=8", "precision=fp32", "device=cpu", "workers=1", "sources.mine.holdout=0.25"),
        "architecture={embed_dim: 16, depth: 1, img_size: 16}",
    ]
    arguments = ["experiment=pretrain", "dataset=folder", f"path={images}", f"out={tmp_path / 'one'}", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, str(CONFIGS.parents[1] / "train.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    same = [f"sources.mine.path={images}", f"out={tmp_path / 'two'}", *settings]
    assert run.main([str(CONFIGS / "folder.yaml"), *same]) == 0
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["dataset=fold"], "dataset=fold .* expected one of folder, vim_nano"), (["-m"], "-m does not go with")],
)
def test_what_only_fine_tuning_knows_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        command.translated(["experiment=pretrain", *arguments], CONFIGS.parent)


def test_a_command_without_a_set_is_about_a_folder():
    config, overrides = command.translated(["experiment=pretrain", "path=a", "steps=3"], CONFIGS.parent)
    assert config == CONFIGS / "folder.yaml" and overrides == ["sources.mine.path=a", "steps=3"]


# Sources


def test_marked_images_are_held_out(tmp_path):
    splits = ["train", "test"] * 12
    file = write_source(tmp_path / "a.npz", splits)
    source = load_source("a", SourceConfig(file), Preprocessing((16, 16), "bicubic", (0,) * 3, (1,) * 3), 0, workers=1)
    assert source.held_out.tolist() == list(range(1, 24, 2)) and source.train.tolist() == list(range(0, 24, 2))
    assert source.images.shape == (24, 3, 16, 16) and source.sha256 == sha256_file(Path(file))
    assert source.images[:2].float().mean((1, 2, 3)).tolist() == [40, 200]


def test_groups_are_held_out_whole_and_workers_change_nothing(tmp_path):
    file = write_source(tmp_path / "a.npz")
    preprocessing = Preprocessing((4, 4), "bicubic", (0,) * 3, (1,) * 3)
    config = SourceConfig(file, holdout=0.5, group=6)
    one, two = (load_source("a", config, preprocessing, 3, workers=workers) for workers in (1, 2))
    assert sorted([*one.train.tolist(), *one.held_out.tolist()]) == list(range(24))
    assert len(one.held_out) == 12 and len({i // 6 for i in one.held_out.tolist()}) == 2
    torch.testing.assert_close(one.images, two.images)
    assert one.held_out.tolist() == two.held_out.tolist()


def test_nothing_held_out_is_refused(tmp_path):
    file = write_source(tmp_path / "a.npz")
    with pytest.raises(UserError, match="0 held out"):
        load_source("a", SourceConfig(file, holdout=0), Preprocessing((4, 4), "bicubic", (0,) * 3, (1,) * 3), 0)


# Augmentation


def test_without_any_randomness_images_stay_as_they_are():
    images = torch.rand(3, 3, 16, 16)
    still = AugmentConfig(min_area=1, max_aspect=1, degrees=0, jitter=0, erase=0)
    found = augment.augment(images, SourceConfig("", flip=0, grey=0, invert=0), still)
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)


def test_each_change_does_what_it_says():
    images = torch.rand(4, 3, 16, 16)
    still = AugmentConfig(min_area=1, max_aspect=1, degrees=0)
    torch.testing.assert_close(augment.warp(images, 1.0, still), images.flip(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(augment.recolour(images, 0, 1, 0), 1 - images, atol=1e-5, rtol=0)
    grey = augment.recolour(images, 1, 0, 0)
    torch.testing.assert_close(grey[:, 0], grey[:, 1], atol=1e-6, rtol=0)
    changed = (augment.erase(images, 1.0) != images).any(1).float().mean((1, 2))
    assert (changed > 0).all() and (changed < 0.4).all()


def test_crops_come_from_inside_the_image():
    ramp = torch.linspace(0, 1, 64).expand(32, 3, 64, 64)
    found = augment.warp(ramp, 0.0, AugmentConfig(min_area=0.25, max_aspect=1, degrees=0))
    widths = found[:, 0, 0, -1] - found[:, 0, 0, 0]
    assert widths.min() > 0.45 and widths.max() <= 1.0 and widths.std() > 0.05


# The loop


def test_batches_are_shared_out():
    assert loop.batch_sizes({"a": 0.56, "b": 0.32, "c": 0.12}, 100) == {"a": 56, "b": 32, "c": 12}
    assert loop.batch_sizes({"a": 1, "b": 1e-6}, 10) == {"a": 9, "b": 1}


def test_the_schedule_rises_and_falls(config):
    rates = [loop.learning_rate(config, step, 30) for step in range(31)]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[30] == pytest.approx(config.min_lr)
    assert loop.learning_rate(config, 20, None) == 0.01


def test_state_matrices_tokens_and_vectors_do_not_decay():
    backbone = create_backbone("vim_nano_patch8_64", "random", **TINY)
    decayed, kept = (len(group["params"]) for group in model.decay_groups(backbone, 0.1))
    names = [name for name, p in backbone.named_parameters() if p.ndim < 2 or "_log" in name or name.count(".") == 0]
    assert kept == len(names) and decayed + kept == len(list(backbone.parameters()))


def test_the_average_follows_at_once_and_then_slowly():
    follower = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(follower.weight)
    average = model.Average(follower, 0.9)
    with torch.no_grad():
        follower.weight.fill_(1.0)
    average.update()
    assert float(average.model.weight) == pytest.approx(1 - 2 / 11)
    for _ in range(200):
        average.update()
    with torch.no_grad():
        follower.weight.fill_(2.0)
    average.update()
    assert float(average.model.weight) == pytest.approx(1.1)


def test_a_kernel_that_is_wrong_is_passed_over(monkeypatch):
    backbone = create_backbone("vim_nano_patch8_64", "random", **TINY)
    honest = model._features_and_gradients

    def wrong(backbone, kernel, device, images):
        found = honest(backbone, "naive", device, images)
        return [2 * tensor for tensor in found] if kernel == "torch" else found

    images = torch.randn(2, 3, 16, 16)
    device = torch.device("cpu")
    assert model.choose_kernel(backbone, "auto", device, images)[0] == "torch"
    monkeypatch.setattr(model, "_features_and_gradients", wrong)
    assert model.choose_kernel(backbone, "auto", device, images)[0] == "naive"
    with pytest.raises(UserError, match="No kernel agrees"):
        model.choose_kernel(backbone, "torch", device, images)


def test_a_run_learns_and_writes_weights_that_load(config):
    record = run.pretrain(config)
    out = Path(config.out)
    assert record == json.loads(out.with_suffix(".json").read_text())
    assert record["sha256"] == sha256_file(out.with_suffix(".safetensors"))
    assert record["steps"] == 30 and all(source["held_out_accuracy"] == 1.0 for source in record["data"].values())
    assert str(out.parent.parent) not in json.dumps(record)
    state = load_file(out.with_suffix(".safetensors"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    loaded = create_backbone(config.backbone, str(out.with_suffix(".safetensors")), **TINY)
    torch.testing.assert_close(loaded.cls_token, state["cls_token"].float())


class KilledError(Exception):
    """Nothing in the code catches it."""


def test_an_interrupted_run_goes_on_to_the_same_weights(config, tmp_path, monkeypatch, capsys):
    config = replace(config, steps=50, checkpoint_every_s=0, out=str(tmp_path / "once"))
    whole = run.pretrain(config)
    again = replace(config, out=str(tmp_path / "again"))
    advance = loop.Pretraining._advance

    def dies_in_step_33(self, step):
        if step == 33:
            raise KilledError
        advance(self, step)

    monkeypatch.setattr(loop.Pretraining, "_advance", dies_in_step_33)
    with pytest.raises(KilledError):
        run.pretrain(again)
    monkeypatch.undo()
    assert (tmp_path / "again.checkpoint").is_file()
    capsys.readouterr()
    assert run.pretrain(again)["sha256"] == whole["sha256"]
    assert "goes on after step 20" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.slow
def test_a_killed_process_is_continued_by_the_same_command(config, tmp_path):
    script = CONFIGS.parents[1] / "scripts" / "pretrain.py"
    settings = [
        *(f"sources.mine.path={config.sources['one'].path}", "sources.mine.holdout=0.25", f"out={tmp_path / 'again'}"),
        *("steps=120", "warmup_steps=3", "batch_size=8", "precision=fp32", "device=cpu", "workers=1"),
        *("architecture={embed_dim: 16, depth: 1, img_size: 16}", "checkpoint_every_s=0"),
    ]
    process_line = [sys.executable, str(script), str(CONFIGS / "folder.yaml"), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(process_line, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (tmp_path / "again.checkpoint").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(process_line, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "goes on after step" in done.stdout
    found = json.loads((tmp_path / "again.json").read_text())
    assert found["steps"] == 120
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run.pretrain(load_config(CONFIGS / "folder.yaml", [*settings, f"out={tmp_path / 'once'}"]))
    finally:
        torch.set_num_threads(threads)
    assert found["sha256"] == whole["sha256"]


def test_a_checkpoint_of_another_run_is_refused(config, tmp_path):
    file = Path(config.out).with_name("weights.checkpoint")
    checkpoint.write_checkpoint(file, "of another", {})
    with pytest.raises(UserError, match="other settings"):
        run.pretrain(config)
    file.write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be read"):
        run.pretrain(config)


def test_the_same_seed_gives_the_same_weights(config):
    assert run.pretrain(config)["sha256"] == run.pretrain(config)["sha256"]


# The embedded weights


def test_the_embedded_weights_are_those_of_their_record():
    record = json.loads((EMBEDDED_WEIGHTS / "vim_nano.json").read_text())
    file = EMBEDDED_WEIGHTS / record["file"]
    assert sha256_file(file) == record["sha256"] and file.stat().st_size < 4e6
    backbone = create_backbone("vim_nano_patch8_64")
    assert sum(p.numel() for p in backbone.parameters()) == record["parameters"]
    cfg = backbone.default_cfg
    assert (list(cfg["mean"]), list(cfg["std"]), list(cfg["input_size"])) == (
        record["mean"],
        record["std"],
        record["input_size"],
    )
