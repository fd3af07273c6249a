"""Keys of the presets: what `method=[a,b]` merges never overwrites one file with another."""

import itertools

import pytest
from helpers.method_cases import CLASSES, CONFIGS, PRESETS, methods_of, tiny_backbone
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.utils.errors import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_keys_say_which_file_they_are_from(name):
    keys = list(PRESETS[name].methods)
    assert keys == [name] or (len(keys) > 1 and all(key == name or key.startswith(f"{name}_") for key in keys))


def test_no_key_is_in_two_files():
    for first, second in itertools.combinations(PRESETS.values(), 2):
        shared = first.methods.keys() & second.methods.keys()
        assert not shared, f"{first.name}.yaml and {second.name}.yaml both have {', '.join(shared)}"


@pytest.mark.parametrize("chosen", [("affix_wo_proj", "affix"), ("prompt", "prompt_wo_proj"), ("hybrid", "affix")])
def test_two_presets_for_one_port_are_refused_with_both_names(chosen):
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("train", overrides=[f"method=[{','.join(chosen)}]"])
    methods = OmegaConf.to_container(config.method)
    assert methods.keys() == {key for name in chosen for key in PRESETS[name].methods}
    with pytest.raises(UserError) as error:
        adapt(tiny_backbone(), methods_of(methods), CLASSES)
    assert all(any(f"'{key}'" in str(error.value) for key in PRESETS[name].methods) for name in chosen)
