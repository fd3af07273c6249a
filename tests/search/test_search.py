"""Search spaces, and searches that are shared, interrupted, resumed, and whose trials fail."""

import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from helpers import crashes, runs
from helpers.wandb_files import offline_runs
from optuna.trial import FixedTrial, TrialState
from PIL import Image

from mambapeft_vision.adapter.presets import read_preset, read_presets
from mambapeft_vision.results.record import read_record
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.search import search as search_module
from mambapeft_vision.search.command import parse
from mambapeft_vision.search.plots import history, importances
from mambapeft_vision.search.search import Search, export, open_study, release_dead_trials, search
from mambapeft_vision.search.space import read_space
from mambapeft_vision.utils.errors import UserError

SPACES = sorted((runs.CONFIGS / "search").glob("*.yaml"))
DEFAULTS = {"space": "hybrid_step1", "trials": "3", "protocol": "validation"}


@pytest.fixture(scope="module")
def presets():
    return read_presets(runs.CONFIGS / "method")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """One task, custom/one, with the lists that validation needs."""
    folder = tmp_path_factory.mktemp("data")
    task = runs.lay_out_task(folder / "custom" / "one")
    lines = (task / "train800val200.txt").read_text().splitlines(keepends=True)
    (task / "train800.txt").write_text("".join(lines[:30]))
    (task / "val200.txt").write_text("".join(lines[30:]))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(data: Path, *more: str) -> list[str]:
    return [
        *runs.SMALL_BACKBONE,
        "dataset=folder",
        "dataset.name=custom/one",
        "dataset.folder=${paths.data}/${dataset.name}",
        f"dataset.num_classes={runs.CLASSES}",
        "trainer.max_epochs=1",
        "trainer.warmup_epochs=0",
        "trainer.device=cpu",
        f"paths.data={data}",
        *more,
    ]


def settings(data: Path, *more: str, tuned: bool = False) -> Search:
    defaults = {**DEFAULTS, "space": "tune"} if tuned else DEFAULTS
    return parse(arguments(data, *more), runs.CONFIGS, defaults, tuned=tuned)


# Spaces


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_space_is_valid(path, presets):
    preset = None if "parts" in yaml.safe_load(path.read_text()) else "hybrid"
    space = read_space(path, presets, preset)
    assert len(space.tasks) == 5 and space.parts


def test_first_step_is_any_subset_at_minimal_sizes(presets):
    space = read_space(runs.CONFIGS / "search" / "hybrid_step1.yaml", presets)
    assert len(space.parts) == 19
    off = {f"use.{name}": False for name in space.parts}
    point = space.suggest(FixedTrial({**off, "use.lora_p_x": True, "use.affix": True}))
    assert point.methods.keys() == {"lora_p_x", "affix"} and point.trainer == {"clip_norm": None}
    assert point.methods["lora_p_x"] == {**presets["lora_p_x"].methods["lora_p_x"], "rank": 8}
    assert point.methods["affix"]["tokens"] == 1
    assert space.suggest(FixedTrial(off)).methods.keys() == {"linear_probe"}


def test_second_step_drops_one_part_and_sizes_the_others(presets):
    space = read_space(runs.CONFIGS / "search" / "hybrid_step2.yaml", presets)
    study = optuna.create_study()
    trial = study.ask()
    point = space.suggest(trial)
    assert len(point.methods) == (8 if trial.params["drop"] == "none" else 7)
    assert len(trial.params) == 1 + 2 * 8 + 5 * 2 + 1 + 2
    assert trial.distributions["lora_p_x.rank"] == optuna.distributions.IntDistribution(4, 16, step=4)
    assert trial.distributions["a.decay_mult"].high == 100 and trial.distributions["affix.decay_mult"].high == 10
    assert trial.distributions["lora_p_b.scale"].log
    assert point.trainer.keys() == {"clip_norm", "head_lr_mult", "head_decay_mult"}
    kept = space.suggest(FixedTrial({**trial.params, "drop": "lora_p_b"})).methods
    assert kept.keys() == set(space.parts) - {"lora_p_b"}
    assert kept["lora_p_x"]["scale"] == trial.params["lora_p_x.scale"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("choose: some\ntasks: []\nparts: {a: {}}", "choose: 'some'"),
        ("choose: all\ntasks: []\nparts: {lora_p_y: {}}", "lora_p_y is no preset"),
        ("choose: all\ntasks: []\nparts: {a: {fixed: {rank: 4}}}", "a has no setting rank"),
        ("choose: all\ntasks: []\nparts: {a: {tune: {lr_mult: {low: 2, high: 1}}}}", "low below high"),
        ("choose: all\ntasks: []\npart: {a: {}}", "part is unknown; did you mean parts"),
        ("choose: all\ntasks: []", "lists no parts"),
    ],
)
def test_mistakes_in_a_space_are_named(tmp_path, presets, text, message):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_space(tmp_path / "space.yaml", presets)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("space=hybrid_step3", "did you mean hybrid_step"),
        ("trials=none", "whole number"),
        ("protocol=test", "validation"),
        ("--x", "unknown"),
    ],
)
def test_mistakes_in_the_command_are_named(data, wrong, message):
    with pytest.raises(UserError, match=message):
        settings(data, wrong)


# Searches


def test_a_search_scores_on_val200_resumes_and_exports_a_method(data, here):
    winner = search(settings(data), runs.CONFIGS)
    (folder,) = (here / "searches").iterdir()
    assert (
        folder.name == "hybrid_step1_validation" and winner.resolve() == folder / "method" / f"{folder.name}_best.yaml"
    )
    records = [read_record(file) for file in (folder / "runs").rglob("result.json")]
    assert {(r.config["dataset"]["train_split"], r.config["dataset"]["test_split"]) for r in records} == {
        ("train800", "val200")
    }
    assert {record.num_test for record in records} == {10}

    search(settings(data, "trials=6"), runs.CONFIGS)
    study = open_study(settings(data))
    assert len(study.trials) == 6 and {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    accuracies = {record.accuracy for record in (read_record(f) for f in (folder / "runs").rglob("result.json"))}
    assert study.best_value == pytest.approx(100 * max(accuracies))

    best = study.best_trial.user_attrs
    preset = read_preset(winner)
    assert preset.methods == best["point"]["methods"] and preset.count == best["trainable"]
    assert "test images were not used" in winner.read_text()
    chosen = [f"hydra.searchpath=[file://{folder}]", f"method={winner.stem}"]
    plan = make_plan(runs.compose_train([*chosen, *arguments(data)]))
    assert plan.config["method"] == preset.methods and plan.recipe.clip_norm is None
    with Image.open(folder / "history.png") as image:
        image.load()

    with pytest.raises(UserError, match="another space, protocol"):
        open_study(settings(data, "name=hybrid_step1_validation", "protocol=reference"))


def test_the_reference_protocol_is_labelled_everywhere(data, here):
    winner = search(settings(data, "trials=1", "protocol=reference"), runs.CONFIGS)
    assert "reference" in winner.name and "SCORED ON THE TEST IMAGES" in winner.read_text()
    (record,) = (read_record(file) for file in (here / "searches").rglob("result.json"))
    assert record.num_test == runs.TEST_IMAGES


def test_tuning_keeps_the_method(data, here):
    winner = search(settings(data, "method=lora_p_x", "trials=2", tuned=True), runs.CONFIGS)
    found = read_preset(winner)
    assert found.methods.keys() == {"lora_p_x"} and found.methods["lora_p_x"]["rank"] == 64
    assert (
        0.01 <= found.methods["lora_p_x"]["scale"] <= 10 and 1e-4 <= found.overrides["trainer"]["learning_rate"] <= 1e-2
    )


def test_a_search_is_a_run_on_wandb_that_its_trials_name(data, here):
    search(
        settings(data, "method=lora_p_x", "trials=1", "logger=wandb", "logger.mode=offline", tuned=True), runs.CONFIGS
    )
    trial, parent = sorted(offline_runs(here / "searches"), key=lambda run: run.job_type)
    assert (trial.job_type, parent.job_type) == ("run", "search")
    assert trial.config["sweep"] == parent.id == parent.config["sweep"] == "tune_lora_p_x_validation"
    assert (parent.summary["complete"], parent.summary["best"]) == (1, pytest.approx(100 * trial.summary["accuracy"]))
    logged = {key: value for row in parent.history for key, value in row.items()}
    assert parent.file(logged["pictures/history"]).is_file() and parent.file(logged["tables/trials"]).is_file()


def test_a_failed_trial_is_a_failed_trial(data, here, monkeypatch):
    calls, train = [], search_module.train

    def failing(*given):
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("no luck")
        return train(*given)

    monkeypatch.setattr(search_module, "train", failing)
    search(settings(data), runs.CONFIGS)
    trials = open_study(settings(data)).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert trials[1].user_attrs["error"] == "RuntimeError: no luck"


def test_a_search_whose_folder_is_deleted_says_so(data, here, monkeypatch):
    folder = settings(data).folder

    def deleting(*_):
        shutil.rmtree(folder)
        raise RuntimeError("no luck either")

    monkeypatch.setattr(search_module, "train", deleting)
    with pytest.raises(UserError, match="was deleted while the search ran; the same command begins it anew"):
        search(settings(data), runs.CONFIGS)


def test_a_search_in_which_nothing_succeeds_gives_up(data, here):
    with pytest.raises(UserError, match=r"first 5 trials all failed, the last with: .*nowhere"):
        search(settings(data, "trials=50", "paths.data=nowhere"), runs.CONFIGS)


def test_the_trial_of_a_dead_worker_is_tried_again(data, here):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    study, space = open_study(settings(data)), settings(data).space
    mine, lost = study.ask(), study.ask()
    mine.set_user_attr("worker", [search_module.socket.gethostname(), os.getpid()])
    lost.set_user_attr("worker", [search_module.socket.gethostname(), dead.pid])
    point = space.suggest(lost)
    release_dead_trials(study, space)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING]
    assert space.suggest(study.ask()) == point


# Studies that do not fit, and studies of others


@pytest.mark.parametrize("name", ["a/b", "../x", "/tmp/x", "con=fig", "a b", "x" * 300])
def test_names_that_are_no_names_are_refused_before_anything_runs(data, here, name):
    with pytest.raises(UserError, match="name="):
        settings(data, f"name={name}")
    assert not list(here.iterdir())


def test_a_search_on_other_images_is_not_continued(data, here, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    search(settings(tmp_path / "data", "trials=1"), runs.CONFIGS)
    search(settings(tmp_path / "data", "trials=1"), runs.CONFIGS)  # the same images
    file = tmp_path / "data" / "custom" / "one" / "val200.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"the images of custom/one are not those that the study .* was begun with"):
        search(settings(tmp_path / "data", "trials=2"), runs.CONFIGS)
    assert len(open_study(settings(tmp_path / "data")).trials) == 1


def test_nothing_that_a_study_notes_is_written_out_or_run(data, here, monkeypatch, capsys):
    """A journal of others: its notes hold references to the environment, escapes and another worker's shape."""
    monkeypatch.setenv("RED_SECRET", "hunter2")
    its = settings(data, "method=lora_p_x", tuned=True)
    study = open_study(its)
    trial = study.ask()
    its.space.suggest(trial)
    evil = {"lora_p_x": {"_target_": "os.system", "targets": "${oc.env:RED_SECRET}"}}
    trial.set_user_attr("point", {"methods": evil, "trainer": {"device": "${oc.env:RED_SECRET}"}})
    trial.set_user_attr("trainable", "\n${oc.env:RED_SECRET}")
    study.tell(trial, 99.0)
    study.ask().set_user_attr("worker", ["\x1b", {}])
    release_dead_trials(study, its.space)
    text = export(its, study).read_text()
    assert "RED_SECRET" not in text and "os.system" not in text and "count: 0" in text
    failed = study.ask()
    failed.set_user_attr("error", "\x1b[2J")
    study.tell(failed, state=TrialState.FAIL)
    search_module.announce(study, study.trials[-1])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("params", [{}, {"lora_p_x.scale": 1e9}, {"lora_p_x.scale": "${oc.env:HOME}"}])
def test_parameters_outside_of_the_space_are_refused(data, here, params):
    its = settings(data, "method=lora_p_x", tuned=True)
    trial = open_study(its).ask()
    its.space.suggest(trial)
    assert its.space.point_of(trial.params).methods
    with pytest.raises(UserError, match="the study has"):
        its.space.point_of({**trial.params, **params} if params else {})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:sec/ret@h/db", "postgresql://u:secret@h:port/db", "nonsense://u:secret@h/db", "u:secret@h",
        "postgresql://u:sec@ret@h/db", "postgresql://h/db?user=u&password=secret", "sqlite://u:secret@h/no/such.db", "mysql+nothing://u:secret@h/db?x=1",
    ],
)  # fmt: skip
def test_no_message_has_the_password_of_a_database(data, here, monkeypatch, url):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UserError, match="storage=") as caught:
        open_study(settings(data, f"storage={url}"))
    text = "".join(traceback.format_exception(caught.value)).partition("UserError:")[2]
    assert "sec" not in str(caught.value) and "ret@" not in str(caught.value) and "sec" not in text


def test_plots_that_cannot_be_drawn_cost_no_search(data, here, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(search_module, "history", fail)
    assert search(settings(data, "trials=1"), runs.CONFIGS).is_file()
    assert "warning: history.png is not drawn" in capsys.readouterr().err


def test_plots_show_the_best_so_far_and_what_matters():
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: 70 + trial.suggest_float("scale", 0, 5) + 0 * trial.suggest_float("idle", 0, 1), 20)
    study.tell(study.ask(), state=TrialState.FAIL)
    trials, best, failed = history(study, "a search").axes[0].lines
    assert list(best.get_ydata()) == list(np.maximum.accumulate(trials.get_ydata())) and len(trials.get_xdata()) == 20
    assert list(failed.get_xdata()) == [20]
    bars = importances(study, "a search").axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["scale", "idle"]
    assert bars.patches[0].get_width() > 0.9
    assert importances(optuna.create_study(), "a search") is None


@pytest.mark.slow
def test_two_workers_share_a_study(data, here):
    command = arguments(data, "trials=12", f"storage=sqlite:///{here}/study.db")
    workers = [crashes.begin(here, "scripts/search_hybrid.py", *command) for _ in range(2)]
    for code, out, err in [worker.end() for worker in workers]:
        assert code == 0 and "winner:" in out, err
    trials = open_study(settings(data, "trials=12", f"storage=sqlite:///{here}/study.db")).trials
    assert 12 <= len(trials) <= 13  # both may begin the last one
    assert len({trial.user_attrs["worker"][1] for trial in trials}) == 2
