"""The dataset configs: they compose, build their data modules, and say what the table says."""

from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException

from mambapeft_vision.data import TASKS, DemoDataModule, TaskDataModule
from mambapeft_vision.data.prepare.published import FEW_SHOT, FGVC
from mambapeft_vision.data.tasks import DIGITS

DATASETS = Path(__file__).parents[2] / "configs" / "dataset"
VTAB = sorted(f"vtab/{file.stem}" for file in (DATASETS / "vtab").glob("*.yaml"))


@pytest.fixture
def build(tmp_path):
    """Composes `dataset` under a root config with only the keys that dataset configs may use."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "root.yaml").write_text(
        "defaults:\n  - _self_\n  - dataset: ???\n"
        f"seed: 11\npaths:\n  data: /data\nhydra:\n  searchpath:\n    - file://{DATASETS.parent}\n"
    )

    def compose_and_instantiate(dataset, *overrides):
        with initialize_config_dir(str(tmp_path / "configs"), version_base="1.3"):
            config = compose("root", overrides=[f"dataset={dataset}", *overrides])
        return hydra.utils.instantiate(config.dataset)

    return compose_and_instantiate


def test_there_is_one_config_per_task():
    assert sorted(task.name for task in TASKS.values()) == VTAB


@pytest.mark.parametrize("dataset", VTAB)
def test_a_vtab_config_says_what_the_table_says(build, dataset):
    data = build(dataset)
    task = TASKS[dataset.removeprefix("vtab/")]
    assert type(data) is TaskDataModule
    assert (data.name, data.folder) == (task.name, Path("/data/vtab-1k") / task.folder)
    assert (data.num_classes, data.group, data.num_test) == (task.num_classes, task.group, task.num_test)


def test_the_demo_config_says_what_the_table_says(build):
    data = build("demo/digits")
    assert type(data) is DemoDataModule
    assert (data.name, data.folder) == (DIGITS.name, Path("/data/demo/digits"))
    assert (data.num_classes, data.group, data.num_test) == (DIGITS.num_classes, DIGITS.group, DIGITS.num_test)


@pytest.mark.parametrize("dataset", ["vtab/cifar", "demo/digits"])
def test_the_shared_settings_are_the_recipes(build, dataset):
    data = build(dataset)
    assert (data.train_split, data.test_split) == ("train800val200", "test")
    assert (data.batch_size, data.test_batch_size, data.seed) == (32, 256, 11)
    assert build(dataset, "dataset.batch_size=8", "seed=5").batch_size == 8


def test_a_folder_of_ones_own_needs_folder_and_classes(build):
    data = build("folder", "dataset.folder=/mine", "dataset.num_classes=5")
    assert (data.name, data.folder, data.num_classes, data.num_test) == ("custom/folder", Path("/mine"), 5, None)
    with pytest.raises(InstantiationException, match=r"dataset\.num_classes=null: expected the number of classes"):
        build("folder", "dataset.folder=/mine")
    with pytest.raises(InstantiationException, match=r"expected dataset\.path=DIR"):
        build("folder")


@pytest.mark.parametrize("task", [*FGVC.values(), *FEW_SHOT.values()], ids=lambda task: task.folder)
def test_a_published_benchmarks_config_says_what_the_table_says(build, task):
    family = "fgvc" if task.counts else "fewshot"
    data = build(f"{family}/{task.folder}")
    assert (data.name, data.folder) == (f"{family}/{task.folder}", Path("/data") / family / task.folder)
    assert data.num_classes == task.num_classes and data.num_test in (*task.counts.get("test", ()), None)
    assert data.train_split == ("train800val200" if family == "fgvc" else "shots1_seed0")


def test_a_misspelt_key_is_an_error(build):
    with pytest.raises(hydra.errors.ConfigCompositionException, match="batchsize"):
        build("vtab/cifar", "dataset.batchsize=8")
