"""The learning-rate schedule and the optimiser's groups."""

import math

import pytest

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.engine.schedule import learning_rate, make_optimizer, set_learning_rates
from mambapeft_vision.methods.offset import Offset
from mambapeft_vision.utils.errors import UserError

RECIPE = {
    "max_epochs": 100,
    "learning_rate": 0.001,
    "min_lr": 1e-05,
    "weight_decay": 0.0001,
    "betas": [0.9, 0.999],
    "eps": 1e-08,
    "warmup_epochs": 10,
    "start_factor": 0.001,
    "clip_norm": 5.0,
    "head_lr_mult": 2.0,
    "head_decay_mult": 3.0,
    "precision": "fp32",
    "device": "cpu",
    "checkpoint_every_s": 30.0,
    "picture": False,
    "micro_batch": None,
    "cuda_graph": True,
    "devices": 1,
}
VTAB = {"steps_per_epoch": 32, "max_epochs": 100, "warmup_epochs": 10, "start_factor": 0.001, "min_lr": 1e-05}


def rate(base: float, step: int, **changed) -> float:
    settings = {**VTAB, **changed}
    return learning_rate(base, step=step, epoch=step // settings["steps_per_epoch"], **settings)


def test_warmup_goes_from_the_start_factor_to_the_base_rate_step_by_step():
    assert rate(1e-3, 0) == pytest.approx(1e-6, rel=1e-12)
    assert rate(1e-3, 319) == pytest.approx(1e-3, rel=1e-12)
    rises = [rate(1e-3, step + 1) - rate(1e-3, step) for step in range(319)]
    assert rises == pytest.approx([(1e-3 - 1e-6) / 319] * 319, rel=1e-6)


def test_cosine_moves_once_an_epoch_to_just_above_the_minimum():
    assert rate(1e-3, 320) == rate(1e-3, 351) == pytest.approx(1e-3, rel=1e-12)
    halfway = 1e-5 + (1e-3 - 1e-5) / 2
    assert rate(1e-3, 55 * 32) == pytest.approx(halfway, rel=1e-12)
    last = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 89 / 90)) / 2
    assert rate(1e-3, 3199) == pytest.approx(last, rel=1e-12)


def test_minimum_is_absolute_for_every_group():
    """Also for a group whose base rate is below it, as in the published runs."""
    left = (1 + math.cos(math.pi * 89 / 90)) / 2  # of the way to the minimum, in the last epoch
    for base in (1e-2, 1e-3, 1e-6):
        assert rate(base, 3199) - 1e-5 == pytest.approx(left * (base - 1e-5), rel=1e-9)
    assert rate(0.0, 3199) == 0.0


def test_short_runs():
    assert rate(1e-3, 0, warmup_epochs=0) == 1e-3
    assert rate(1e-3, 0, warmup_epochs=1, steps_per_epoch=1, max_epochs=1) == 1e-3
    assert rate(1e-3, 31, warmup_epochs=1, max_epochs=1) == pytest.approx(1e-3)


def test_groups_follow_the_multipliers_of_methods_and_head():
    backbone = create_backbone("vim_pico_patch8_32", "random", depth=1)
    offset = Offset(targets="cls_token", lr_mult=0.1, decay_mult=10)
    optimizer = make_optimizer(adapt(backbone, {"cls_token": offset}, 3), TrainerConfig(**RECIPE))
    sizes = {sum(p.numel() for p in g["params"]): g for g in optimizer.param_groups}
    assert sizes.keys() == {64, 3 * 64, 3}
    assert sizes[64]["base_lr"] == pytest.approx(1e-4) and sizes[64]["weight_decay"] == pytest.approx(1e-3)
    assert sizes[192]["base_lr"] == pytest.approx(2e-3) and sizes[192]["weight_decay"] == pytest.approx(3e-4)
    assert sizes[3]["base_lr"] == pytest.approx(2e-3) and sizes[3]["weight_decay"] == 0

    set_learning_rates(optimizer, TrainerConfig(**RECIPE), step=319, epoch=9, steps_per_epoch=32)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([g["base_lr"] for g in optimizer.param_groups])


@pytest.mark.parametrize(
    "key, value",
    [
        ("max_epochs", 0),
        ("warmup_epochs", 101),
        ("learning_rate", -1.0),
        ("start_factor", 2.0),
        ("clip_norm", 0.0),
        ("betas", [0.9]),
        ("eps", 0.0),
        ("precision", "fp8"),
        ("checkpoint_every_s", -1.0),
    ],
)
def test_values_that_cannot_be_meant_are_refused(key, value):
    with pytest.raises(UserError, match=rf"trainer\.{key}=.*expected"):
        TrainerConfig(**{**RECIPE, key: value}).check()
