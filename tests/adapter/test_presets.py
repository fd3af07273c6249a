"""Keys of the presets: what `method=[a,b]` merges never overwrites one file with another."""

import itertools

import pytest
from helpers import runs
from helpers.method_cases import CLASSES, CONFIGS, PRESETS, methods_of, tiny_backbone
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.adapter.specs import DEFAULT, RENAMED, for_backbone
from mambapeft_vision.backbones.registry import registered
from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.run.exit import describe_error
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.utils.errors import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_keys_say_which_file_they_are_from(name):
    keys = list(PRESETS[name].methods)
    assert keys == [name] or (len(keys) > 1 and all(key == name or key.startswith(f"{name}_") for key in keys))


def test_no_key_is_in_two_files():
    for first, second in itertools.combinations(PRESETS.values(), 2):
        shared = first.methods.keys() & second.methods.keys()
        assert not shared, f"{first.name}.yaml and {second.name}.yaml both have {', '.join(shared)}"


def test_sizes_by_backbone_name_backbones():
    """A key of a size is `default` or the beginning of a registered name."""
    sizes = [
        value
        for preset in PRESETS.values()
        for spec in preset.specs.values()
        for value in spec.values()
        if isinstance(value, dict)
    ]
    assert sizes
    for size in sizes:
        assert DEFAULT in size
        assert all(any(name.startswith(key) for name in registered()) for key in size if key != DEFAULT)


def test_the_longest_beginning_of_a_name_counts():
    specs = {"m": {"_target_": "x", "rank": {"default": 32, "vim": 1, "vim_b": 64}, "scale": 0.1}}
    ranks = {None: 32, "vit_small": 32, "vim_small_patch16_224": 1, "vim_base_patch16_stride8_224": 64}
    for backbone, rank in ranks.items():
        assert for_backbone(specs, backbone) == {"m": {"_target_": "x", "rank": rank, "scale": 0.1}}
    assert for_backbone({"m": None, "n": {"options": {"a": 1}}}, "vim") == {"m": None, "n": {"options": {"a": 1}}}
    with pytest.raises(UserError, match=r"method.m.rank=.*expected one value for default"):
        for_backbone({"m": {"rank": {"default": {"x": 1}}}}, None)


def planned(*overrides: str) -> dict:
    return make_plan(runs.compose_train(overrides)).config["method"]["lora_in_proj"]


def test_a_run_records_the_size_of_its_backbone():
    assert planned("method=lora_in_proj")["rank"] == 32
    assert planned("method=lora_in_proj", "backbone=vim_b")["rank"] == 64
    assert planned("method=lora_in_proj", "backbone=vim_b", "method.lora_in_proj.rank=8")["rank"] == 8
    assert planned("method=lora_in_proj", "backbone=vim_b", "method_sizes=of_vim_s")["rank"] == 32  # scaled later


def test_runs_keep_the_identity_that_they_had_before_roles_and_sizes_by_backbone():
    """The sha256 of the commits before, for presets whose targets have become roles."""
    config = runs.compose_train(["method=[lora_x_proj,full,lora_in_out,norm,a]"])
    spelled = [
        "method.lora_x_proj.targets=[layers.*.mixer.x_proj.weight,layers.*.mixer.x_proj_b.weight]",
        "method.full.no_decay=[cls_token,pos_embed,layers.*.mixer.A_log,layers.*.mixer.A_b_log]",
        "method.lora_in_out.targets=[layers.*.mixer.in_proj.weight,layers.*.mixer.out_proj.weight]",
        "method.norm.targets=[layers.*.norm.weight,norm_f.weight]",
        "method.a.targets=[layers.*.mixer.A_log,layers.*.mixer.A_b_log]",
    ]
    before = runs.compose_train(["method=[lora_x_proj,full,lora_in_out,norm,a]", *spelled])
    assert make_plan(config).fingerprint == make_plan(before).fingerprint
    assert make_plan(config).config["method"]["a"]["targets"] == "A_log"
    other = runs.compose_train(["method=[lora_x_proj,full,lora_in_out,norm,d]"])
    assert make_plan(config).fingerprint != make_plan(other).fingerprint


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_says_what_to_write(name):
    with pytest.raises(MissingConfigException) as error:
        runs.compose_train([f"method={name}"])
    assert f"write method={name.removesuffix('_base')} backbone=vim_b" in describe_error(error.value)


@pytest.mark.parametrize("chosen", [("affix_wo_proj", "affix"), ("prompt", "prompt_wo_proj"), ("hybrid", "affix")])
def test_two_presets_for_one_port_are_refused_with_both_names(chosen):
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("train", overrides=[f"method=[{','.join(chosen)}]"])
    methods = for_backbone(OmegaConf.to_container(config.method), None)
    assert methods.keys() == {key for name in chosen for key in PRESETS[name].methods}
    with pytest.raises(UserError) as error:
        adapt(tiny_backbone(), methods_of(methods), CLASSES)
    assert all(any(f"'{key}'" in str(error.value) for key in PRESETS[name].methods) for name in chosen)
