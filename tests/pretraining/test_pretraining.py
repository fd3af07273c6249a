"""Pretraining: configs, sources, augmentation, the run, and what it writes."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import crashes, faults, runs
from helpers.pretraining import TINY, write_source
from hydra.errors import HydraException
from mambapeft_kernels import resolve_backend
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from torch import nn

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.build import EMBEDDED_WEIGHTS
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.pretraining import augment, model, module, run
from mambapeft_vision.pretraining.config import (
    AugmentConfig,
    PretrainConfig,
    SourceConfig,
    check_overrides,
    config_of,
)
from mambapeft_vision.pretraining.sources import load_source
from mambapeft_vision.run.exit import describe_error, is_mistake
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.utils.errors import NotFiniteError, Preempted, UserError
from mambapeft_vision.utils.hashing import sha256_file

GOLDEN = Path(__file__).parents[1] / "golden" / "pretraining" / "thirty_steps.safetensors"
# Of a run that takes seconds, for the group `pretrain`.
SETTINGS = [
    *("steps=3", "batch_size=8", "precision=fp32", "device=cpu", "workers=1", "sources.mine.holdout=0.25"),
    *("+architecture.embed_dim=16", "+architecture.depth=1", "+architecture.img_size=16"),
]


def prefixed(*settings: str) -> list[str]:
    """As overrides of train.py."""
    return [f"+pretrain.{text[1:]}" if text.startswith("+") else f"pretrain.{text}" for text in settings]


# Configs


def composed(*overrides: str) -> PretrainConfig:
    return config_of(runs.compose_train(overrides))


def test_the_shipped_configs_are_valid(tmp_path):
    nano = composed(
        "pretrain=vim_nano", "pretrain.steps=null", "pretrain.minutes=1e-1", "pretrain.sources.emoji.share=2"
    )
    assert (nano.minutes, nano.sources["emoji"].share, nano.sources["emoji"].flip) == (0.1, 2.0, 0.0)
    folder = composed("pretrain=folder", f"pretrain.sources.mine.path={tmp_path}", "pretrain.augment.jitter=0")
    assert (folder.steps, folder.minutes, folder.augment.jitter) == (2000, None, 0.0)
    assert composed("experiment=pretrain", f"pretrain.sources.mine.path={tmp_path}").steps == 2000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"pretrain\.sources\.mine\.path: .*Missing mandatory value"),
        (["sources.mine.path=x", "stepz=3"], r"pretrain\.stepz: .*did you mean steps"),
        (["sources.mine.path=x", "steps=many"], r"pretrain\.steps: Value 'many' of type 'str' could not be converted"),
        (["sources.mine.path=x", "steps=2.5"], r"pretrain\.steps: Value '2.5' of type 'float' could not be converted"),
        (["sources.mine.path=x", "cuda_graph=often"], r"pretrain\.cuda_graph: Value 'often' is not a valid bool"),
        (["sources.mine.path=x", "minutes=5"], r"expected exactly one of them"),
        (["sources.mine.path=x", "precision=fp8"], r"pretrain\.precision='fp8'; expected fp32 or bf16"),
        (["sources.mine.path=x", "evaluations=0"], r"pretrain\.evaluations=0; expected at least 1"),
        (["sources.mine.path=x", "batch_size=0"], r"pretrain\.batch_size=0; expected at least one image"),
        (["steps.more=3"], r"pretrain\.steps"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(overrides, message):
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as caught:
        composed("pretrain=folder", *(f"pretrain.{text}" for text in overrides))
    assert is_mistake(caught.value) and re.search(message, describe_error(caught.value))


def test_train_py_pretrains_and_a_shorter_command_too(images, tmp_path):
    settings = [*SETTINGS, f"sources.mine.path={images}"]
    for command in (
        ["train.py", "pretrain=folder", *prefixed(*settings, f"out={tmp_path / 'one'}")],
        ["scripts/pretrain.py", "folder", *settings, f"out={tmp_path / 'two'}"],
    ):
        code, _, err = crashes.command(tmp_path, *command)
        assert code == 0, err
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("override", ["seed=1", "method=lora_p_x", "trainer.max_epochs=3", "+backbone.depth=2"])
def test_what_only_fine_tuning_heeds_is_refused(override):
    with pytest.raises(UserError, match=f"{re.escape(override)} means nothing to pretraining"):
        check_overrides(["pretrain=folder", "pretrain.steps=3", override])


def test_pretraining_is_no_part_of_a_fine_tuning_run():
    with pytest.raises(UserError, match="trains no methods"):
        make_plan(runs.compose_train(["pretrain=folder", "pretrain.sources.mine.path=x"]))
    assert "pretrain" not in make_plan(runs.compose_train([])).config


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
    assert module.batch_sizes({"a": 0.56, "b": 0.32, "c": 0.12}, 100) == {"a": 56, "b": 32, "c": 12}
    assert module.batch_sizes({"a": 1, "b": 1e-6}, 10) == {"a": 9, "b": 1}


def test_the_schedule_rises_and_falls(config):
    rates = [module.learning_rate(0.01, config, step, 30) for step in range(31)]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[30] == pytest.approx(config.min_lr)
    assert module.learning_rate(0.01, config, 20, None) == 0.01


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
    honest = model.features_and_gradients

    def wrong(backbone, kernel, device, images):
        found = honest(backbone, "naive", device, images)
        return [2 * tensor for tensor in found] if kernel != "naive" else found

    images = torch.randn(2, 3, 16, 16)
    device = torch.device("cpu")
    best = model.choose_kernel(backbone, "auto", device, images)[0]
    assert best == resolve_backend("auto", device)
    monkeypatch.setattr(model, "features_and_gradients", wrong)
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


def test_a_short_run_ends_in_the_weights_that_it_always_had(config):
    """Those of the loop before it became a LightningModule. Other processors round sums differently."""
    run.pretrain(config)
    found, golden = load_file(f"{config.out}.safetensors"), load_file(GOLDEN)
    assert found.keys() == golden.keys()
    for name, tensor in golden.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2e-3, atol=1e-4, msg=name)


class KilledError(Exception):
    """Nothing in the code catches it."""


@pytest.mark.parametrize(("killed_in", "goes_on_after"), [(34, 20), (50, 40)])
def test_an_interrupted_run_goes_on_to_the_same_weights(config, tmp_path, capsys, killed_in, goes_on_after):
    config = replace(config, steps=50, checkpoint_every_s=0, out=str(tmp_path / "once"))
    whole = run.pretrain(config)
    again = replace(config, out=str(tmp_path / "again"))
    with pytest.raises(KilledError):
        run.pretrain(again, [faults.raises(KilledError(), killed_in)])
    assert (tmp_path / "again.checkpoint").is_file()
    capsys.readouterr()
    assert run.pretrain(again)["sha256"] == whole["sha256"]
    assert f"continues after step {goes_on_after}" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_run_killed_after_its_last_step_takes_no_other(config, tmp_path, monkeypatch):
    whole = run.pretrain(replace(config, out=str(tmp_path / "once")))
    again = replace(config, out=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "round_to_half", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.pretrain(again)
    step = faults.InStep(1, lambda: pytest.fail("it was trained again"))
    found = run.pretrain(again, [step])
    assert found["sha256"] == whole["sha256"] and found["steps"] == 30


def test_sigterm_saves_the_round_under_way(config, tmp_path):
    config = replace(config, steps=50, checkpoint_every_s=1000, out=str(tmp_path / "once"))
    whole = run.pretrain(config)
    again = replace(config, out=str(tmp_path / "again"))
    with pytest.raises(Preempted, match="terminated after step 20 of 50, which is saved"):
        run.pretrain(again, [faults.InStep(7, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert run.pretrain(again)["sha256"] == whole["sha256"]


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(config):
    def overflow(module):
        next(module.model.heads.parameters()).data.fill_(float("inf"))

    config = replace(config, steps=50, checkpoint_every_s=0)
    with pytest.raises(NotFiniteError, match=r"the loss is nan at step 40; lower pretrain\.learning_rate"):
        run.pretrain(config, [faults.AfterStep(23, overflow)])
    content = torch.load(f"{config.out}.checkpoint", weights_only=True)
    assert content["pretraining"]["step"] == 20
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())


def test_the_number_of_steps_follows_from_the_time(config, capsys):
    config = replace(config, steps=None, minutes=0.02)
    record = run.pretrain(config)
    assert "steps fit into 0.02 minutes" in capsys.readouterr().out
    assert 50 < record["steps"] <= record["planned_steps"]


@pytest.mark.slow
def test_a_killed_process_is_continued_by_the_same_command(images, tmp_path):
    settings = [
        *(text for text in SETTINGS if not text.startswith("steps=")),
        *("steps=120", "warmup_steps=3", "checkpoint_every_s=0"),
        f"sources.mine.path={images}",
    ]
    command = ["pretrain=folder", *prefixed(*settings, f"out={tmp_path / 'again'}")]
    process = crashes.begin(tmp_path, "train.py", *command).process
    deadline = time.monotonic() + 200
    while not (tmp_path / "again.checkpoint").is_file():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    code, out, err = crashes.command(tmp_path, "train.py", *command)
    assert code == 0 and "continues after step" in out, err
    found = json.loads((tmp_path / "again.json").read_text())
    assert found["steps"] == 120
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run.pretrain(composed("pretrain=folder", *prefixed(*settings, f"out={tmp_path / 'once'}")))
    finally:
        torch.set_num_threads(threads)
    assert found["sha256"] == whole["sha256"]


def test_a_checkpoint_of_another_run_is_refused(config):
    config = replace(config, checkpoint_every_s=0)
    with pytest.raises(KilledError):
        run.pretrain(replace(config, seed=1), [faults.raises(KilledError(), 25)])
    with pytest.raises(UserError, match=r"other settings.*pretrain\.out=PATH"):
        run.pretrain(config)
    Path(f"{config.out}.checkpoint").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"cannot be read.*delete it"):
        run.pretrain(config)


def test_the_same_seed_gives_the_same_weights(config):
    assert run.pretrain(config)["sha256"] == run.pretrain(config)["sha256"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, which is not here")
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_run_on_a_gpu_learns_and_an_interrupted_one_goes_on(config, cuda_graph, capsys):
    config = replace(config, device="cuda", steps=50, checkpoint_every_s=0, cuda_graph=cuda_graph)
    with pytest.raises(KilledError):
        run.pretrain(config, [faults.raises(KilledError(), 34)])
    record = run.pretrain(config)
    out = capsys.readouterr().out
    assert "continues after step 20" in out and "cannot be captured" not in out
    assert record["steps"] == 50 and all(source["held_out_accuracy"] == 1.0 for source in record["data"].values())


# The embedded weights


@pytest.mark.parametrize("name", ["vim_nano_patch8_64", "mambareg_nano_patch8_64", "vmamba_nano_patch4_64"])
def test_the_embedded_weights_are_those_of_their_record(name):
    record = json.loads((EMBEDDED_WEIGHTS / f"{name.rpartition('_patch')[0]}.json").read_text())
    file = EMBEDDED_WEIGHTS / record["file"]
    assert sha256_file(file) == record["sha256"] and file.stat().st_size < 4e6
    backbone = create_backbone(name)
    assert sum(p.numel() for p in backbone.parameters()) == record["parameters"]
    cfg = backbone.default_cfg
    assert (list(cfg["mean"]), list(cfg["std"]), list(cfg["input_size"])) == (
        record["mean"],
        record["std"],
        record["input_size"],
    )
