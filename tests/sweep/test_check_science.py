"""make check-science: what it runs, and how it ends. Nothing is trained here."""

import pytest
from helpers import runs
from helpers.fake_records import fake_record

import mambapeft_vision.sweep.sweep as sweeping
from mambapeft_vision.commands import check_science
from mambapeft_vision.data.generated.mini import GENERATED
from mambapeft_vision.sweep.jobs import plan_jobs

ACCURACY = {"scratch": 0.3, "linear_probe": 0.5, "lora_p_x": 0.6}
BACKBONES = {"vim_nano": "vim_nano_patch8_64", "vim_pico": "vim_pico_patch8_32"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    places = [f"paths.data={folder}", f"paths.outputs={folder}"]
    return plan_jobs([*check_science.RUNS, f"backbone={','.join(BACKBONES)}", *places], runs.CONFIGS)


@pytest.fixture
def outcome(planned, monkeypatch):
    """Puts made-up results in the place of the runs."""

    def results(accuracy, failed=0):
        def fake(jobs):
            return [
                fake_record(
                    job.plan.task,
                    job.plan.method_names,
                    job.plan.seed,
                    ACCURACY[job.plan.method_names] if first(job) else accuracy[job.plan.method_names],
                    backbone={"name": job.plan.backbone["name"]},
                )
                for job in jobs
            ]

        def first(job):
            return job.plan.backbone["name"] == BACKBONES["vim_nano"]

        monkeypatch.setattr(check_science, "records_of", fake)
        monkeypatch.setattr(sweeping, "plan_jobs", lambda overrides, configs: planned)
        monkeypatch.setattr(sweeping, "sweep", lambda jobs, command: failed)

    return results


def test_it_is_three_methods_on_every_task_that_needs_no_download_on_each_backbone(planned):
    plans = [job.plan for job in planned]
    assert len(plans) == 30 and {plan.backbone["name"] for plan in plans} == set(BACKBONES.values())
    assert "vim_nano" in check_science.backbones(runs.CONFIGS) and "vim_s" not in check_science.backbones(runs.CONFIGS)
    assert {plan.method_names for plan in plans} == set(ACCURACY)
    tasks = {plan.task.removeprefix("mini/") for plan in plans}
    assert tasks == set(GENERATED)
    assert {plan.recipe.device for plan in plans} == {"cpu"}
    assert {plan.config["dataset"]["test_split"] for plan in plans} == {"test"}


def test_the_order_that_holds_ends_well(outcome, capsys):
    outcome(ACCURACY)
    assert check_science.main([]) == 0
    out = capsys.readouterr().out
    for name in BACKBONES.values():
        assert f"{name}: The order scratch < linear_probe < lora_p_x holds: scratch 30.00 %" in out
    assert "| scratch " in out


@pytest.mark.parametrize("lost", [{"lora_p_x": 0.4}, {"scratch": 0.55}])
def test_an_order_lost_on_one_backbone_is_a_failure(outcome, capsys, lost):
    outcome(ACCURACY | lost)
    assert check_science.main([]) == 1
    out = capsys.readouterr().out
    assert "vim_pico_patch8_32: The order" in out and out.count("LOST") == 1


def test_failed_runs_give_no_verdict(outcome, capsys):
    outcome(ACCURACY, failed=1)
    with pytest.raises(SystemExit) as stop:
        check_science.main([])
    assert stop.value.code == 1 and "order" not in capsys.readouterr().out
