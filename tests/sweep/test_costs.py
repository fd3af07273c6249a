"""What `mambapeft reproduce --dry-run` tells: runs, hours and disk of each backbone."""

import pytest
from helpers import runs

from mambapeft_vision.adapter.presets import read_presets
from mambapeft_vision.commands import reproduce
from mambapeft_vision.sweep.costs import BYTES, FILES, GIB, cost_of, cost_table
from mambapeft_vision.sweep.estimates import Rate, Speeds
from mambapeft_vision.sweep.jobs import plan_jobs


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    command = ["dataset=vtab/cifar,vtab/dtd", "method=lora_p_x", "seed=0,1", f"paths.outputs={outputs}"]
    return plan_jobs(["backbone=vim_s", *command], runs.CONFIGS)


def test_runs_hours_and_disk_are_those_of_the_plans(jobs):
    rate = Rate("vim_small_patch16_224", (), train=1000.0, test=10000.0)
    cost = cost_of("vim_s", jobs, Speeds(rates=[rate]))
    assert (cost.runs, cost.finished, cost.methods) == (4, 0, 1)
    # 1,000 images, 100 epochs; 10,000 test images of cifar, 1,880 of dtd
    assert cost.seconds == pytest.approx(4 * 100 + 2 * 1.0 + 2 * 0.188)
    lora = read_presets(runs.CONFIGS / "method")["lora_p_x"].count
    of_task = {100: 10_000, 47: 1_880}
    assert cost.disk == 2 * sum(
        BYTES * (lora + 385 * classes) + 2 * classes * images + FILES for classes, images in of_task.items()
    )
    table = cost_table([cost], workers=2)
    assert table.rows[0][:5] == ["vim_s", "1", "4", "0", f"{cost.seconds / 7200:.1f}"]
    assert table.rows[0][5] == f"{cost.disk / GIB:.1f}"


def test_what_is_not_known_is_said(jobs):
    unknown = cost_of("vim_s", jobs, Speeds())
    table = cost_table([unknown], workers=1)
    assert table.rows[0][4] == "–" and table.rows[-1][4] == "0.0 and what is not known"


def test_a_dry_run_tells_the_costs_of_each_backbone(tmp_path, capsys):
    """VMamba's weights come from a file that the command does not name: it is planned all the same, and says so."""
    shared = ["dataset=vtab/dtd", f"paths.outputs={tmp_path}", "method=lora_p_x", "--seeds=0,1", "--dry-run"]
    assert reproduce.main(["backbone=vim_s,vmamba_s", *shared]) == 0
    vim, vmamba, both = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert vim.split()[1] == "vim_s" and vmamba.split()[1] == "vmamba_s" and "backbone.weights=FILE" in vmamba
    assert both.split()[1:7:2][0] == "all" and " 4 " in both
    assert not list(tmp_path.iterdir())


def test_methods_that_do_not_fit_a_backbone_are_left_out(monkeypatch):
    presets = {
        row.presets[0]: row for row in reproduce.PUBLISHED[reproduce.VIM_S] if row.presets[0] in ("a", "cls_token")
    }
    monkeypatch.setattr(reproduce, "PUBLISHED", {reproduce.VIM_S: tuple(presets.values())})
    reproduce.fitting_methods.cache_clear()
    try:
        assert set(reproduce.fitting_methods("vmamba_t", runs.CONFIGS)) == {"a"}  # VMamba has no class token
    finally:
        reproduce.fitting_methods.cache_clear()
