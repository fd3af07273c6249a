"""Configs made from one that Hydra composed are as Hydra composes them, and so are the mistakes."""

import os
import shutil
from pathlib import Path

import hydra
import pytest
from helpers import runs
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, OmegaConf

from mambapeft_vision.run.compose import compose
from mambapeft_vision.run.config import register_schemas


def by_hydra(overrides: list[str]) -> DictConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(runs.CONFIGS), version_base="1.3"):
        return hydra.compose("train", overrides)


def check_same(found: Container, expected: Container) -> None:
    """The same values of the same types, with the same schema behind them."""
    assert found == expected
    assert OmegaConf.get_type(found) is OmegaConf.get_type(expected)
    assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)
    assert found._metadata.flags == expected._metadata.flags
    for key in expected if isinstance(expected, DictConfig) else ():
        if isinstance(node := expected._get_node(key), Container) and not node._is_none():
            check_same(found._get_node(key), node)


@pytest.mark.parametrize(
    "overrides",
    [
        runs.overrides(Path("/task"), Path("/outputs"), "method=[lora_p_x,affix]", "method.lora_p_x.rank=8"),
        ["experiment=pretrain", "pretrain.sources.mine.path=x", "pretrain.minutes=1e-1", "pretrain.steps=null"],
        ["trainer.max_epochs=3", "dataset=vtab/dtd", "trainer.max_epochs=4", "seed=16", "method.lora_p_x.scale=2"],
        ["backbone=vit_s", "+backbone.depth=2", "method=bitfit", "trainer.learning_rate='1e-3'"],
        ["method.lora_p_x.targets=[in_proj,out_proj]", "paths.outputs=${paths.data}/x", "paths.cache=null"],
        ["trainer.max_epochs=4", "++trainer.max_epochs=3"],
        ["~logger"],
    ],
)
def test_a_config_is_as_hydra_composes_it(overrides):
    for _ in range(2):  # composed, and from the one that is kept
        check_same(compose("train", overrides), by_hydra(overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora_p_y"],
        ["trainer.max_epoch=3"],
        ["+trainer.max_epochs=3"],
        ["trainer.max_epochs=many"],
        ["trainer.max_epochs=1,2"],
        ["trainer.max_epochs=[1"],
        ["trainer.max_epochs.more=3"],
        ["~nothing"],
        ["method"],
    ],
)
def test_mistakes_are_told_as_hydra_tells_them(overrides):
    with pytest.raises(HydraException) as expected:
        by_hydra(overrides)
    with pytest.raises(type(expected.value)) as found:
        compose("train", overrides)
    assert (str(found.value), str(found.value.__cause__)) == (str(expected.value), str(expected.value.__cause__))


def test_a_root_in_hydras_store_is_the_one_that_is_there_now():
    for number in (1, 2):
        ConfigStore.instance().store(name="of_a_test", node={"number": number})
        assert compose("of_a_test", []).number == number


def test_a_change_stays_in_its_own_config_and_a_file_that_changes_is_read_again(tmp_path):
    configs = Path(shutil.copytree(runs.CONFIGS, tmp_path / "configs"))
    compose("train", [], configs=configs).trainer.max_epochs = -1
    before = compose("train", [], configs=configs).trainer
    file = configs / "trainer" / "default.yaml"
    file.write_text(file.read_text().replace(f"max_epochs: {before.max_epochs}", "max_epochs: 7"))
    os.utime(file, ns=(0, 0))  # whatever the clock's resolution
    assert before.max_epochs > 7 == compose("train", [], configs=configs).trainer.max_epochs
