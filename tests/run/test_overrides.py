"""What train.py -m understands beyond Hydra: glob() over subfolders, and a name for the sweep."""

import pytest
from helpers import crashes, runs

from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.run.overrides import prepare_multirun, sweep_name
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.utils.errors import UserError


def prepared(*arguments: str) -> list[str]:
    return prepare_multirun(arguments, runs.CONFIGS)


def test_globs_see_options_in_subfolders():
    flag, dataset, method, _, sweep = prepared("-m", "dataset=glob(vtab/*)", "method=glob(lora_p_*)")
    assert flag == "-m" and sweep.startswith("sweep=sweep-")
    assert set(dataset.removeprefix("dataset=").split(",")) == {task.name for task in TASKS.values()}
    assert method == "method=lora_p_b,lora_p_c,lora_p_d,lora_p_x,lora_p_z"


def test_globs_see_other_config_folders(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "lora_p_mine.yaml").write_text("")
    flags = ("--multirun", "--config-dir", str(tmp_path))
    assert "method=lora_p_mine,lora_p_x" in prepared(*flags, "method=glob([*mine,lora_p_x*])")


def test_a_glob_that_matches_nothing_says_where_it_looked():
    with pytest.raises(UserError, match=r"dataset=glob\(vtabb/\*\) matches nothing in .*/configs/dataset"):
        prepared("-m", "dataset=glob(vtabb/*)")


def test_other_command_lines_are_left_alone():
    for arguments in (["dataset=glob(vtab/*)"], ["method=lora_p_x", "--cfg", "job"]):
        assert prepare_multirun(arguments, runs.CONFIGS) == arguments
    flag, seed, sweep, folder, *rest = prepared("-m", "seed=0,1", "sweep=mine", "--cfg", "job")
    assert [flag, seed, sweep, *rest] == ["-m", "seed=0,1", "sweep=mine", "--cfg", "job"]
    assert folder.startswith("hydra.sweep.subdir=launch-")


def test_a_sweep_has_one_name_wherever_it_runs():
    name = sweep_name(["method=a,d", "seed=0,1"])
    assert name == sweep_name(["seed=0,1", "method=a,d", "paths.outputs=elsewhere", "logger=wandb"])
    assert name != sweep_name(["method=a,d", "seed=0"])
    assert runs.compose_train([f"sweep={name}"]).sweep == name


def test_the_sweep_is_no_part_of_a_runs_identity():
    alone, swept = (make_plan(runs.compose_train(command)) for command in ([], ["sweep=mine"]))
    assert alone.folder == swept.folder and swept.config["sweep"] == "mine"


def test_the_plain_hydra_way_plans_every_task(tmp_path):
    """As the README writes it: 2 methods x 4 tasks x 2 seeds; the backbone is a small one."""
    command = ["train.py", "-m", "method=linear_probe,a", "dataset=glob(vtab/s*)", "seed=0,1", "dry_run=true"]
    command += [*runs.SMALL_BACKBONE, "backbone.weights=random"]
    code, out, err = crashes.command(tmp_path, *command)
    assert code == 0, err
    begun = [line for line in out.splitlines() if line.startswith("━━ run")]
    assert len(begun) == 16 and len(set(begun)) == 16
