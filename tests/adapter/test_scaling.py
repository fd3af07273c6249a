"""method_sizes=of_vim_s: presets keep their share of Vim-S's channels and states on another backbone."""

import pytest
from helpers import runs

from mambapeft_vision.run.build import build_backbone, build_model
from mambapeft_vision.run.report_lines import describe_sizes, dry_run_report
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.utils.errors import UserError


def plan_of(*overrides: str) -> RunPlan:
    return make_plan(runs.compose_train(overrides))


def model_of(plan: RunPlan):
    return build_model(plan, build_backbone(plan), num_classes=3)


@pytest.mark.parametrize(
    ("method", "key", "size"),
    [
        ("lora_p_x", "rank", 16),  # 64 of 768 channels are 16 of 192
        ("additional_scan", "states", 3),  # 6 of 16 states are 3 of 8
        ("prodial", "n_blocks", 48),
        ("prodial", "alpha", 4),  # as its rank, 16 in Vim-S: alpha / rank scales the branch
        ("affix_wo_proj", "tokens", 3),  # no width
    ],
)
def test_sizes_keep_their_share(method, key, size):
    plan = plan_of("experiment=mini", f"method={method}")
    assert getattr(model_of(plan).methods[method], key) == size
    assert plan.config["method"] == plan_of(f"method={method}").config["method"]  # what is recorded is what was given


def test_a_size_given_by_hand_is_a_share_too_and_at_least_one():
    assert model_of(plan_of("experiment=mini", "method.lora_p_x.rank=32")).methods["lora_p_x"].rank == 8
    assert model_of(plan_of("experiment=mini", "method.lora_p_x.rank=1")).methods["lora_p_x"].rank == 1


def test_sizes_stay_unless_asked_for_and_on_vim_s():
    given = plan_of("backbone=vim_nano")
    assert model_of(given).methods["lora_p_x"].rank == 64 and not describe_sizes(given, model_of(given))
    small = plan_of("method_sizes=of_vim_s", "backbone.weights=random", "+backbone.depth=1")
    assert model_of(small).methods["lora_p_x"].rank == 64


def test_runs_of_other_sizes_are_other_runs():
    scaled, given = (plan_of("backbone=vim_nano", f"method_sizes={sizes}") for sizes in ("of_vim_s", "given"))
    assert scaled.fingerprint != given.fingerprint


def test_the_dry_run_says_what_was_scaled():
    assert "sizes scaled from Vim-S: lora_p_x.rank 64 → 16" in dry_run_report(plan_of("experiment=mini"))


def test_what_has_no_sizes_to_compare_with_is_refused():
    with pytest.raises(UserError, match="method_sizes='double'; expected one of given, of_vim_s"):
        plan_of("method_sizes=double")
    with pytest.raises(UserError, match="expected a state-space backbone"):
        model_of(plan_of("method_sizes=of_vim_s", *runs.SMALL_VIT, "method=lora_qv"))
