"""The mini benchmark: its runs are train.py's, its choices those of the numbers, and its script works end to end."""

import dataclasses
import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import crashes, runs
from helpers.fake_records import fake_record

from mambapeft_vision.benchmarks.mini import (
    TASKS,
    Benchmark,
    Wanted,
    benchmark_methods,
    jobs_of_stage,
    plan_runs,
    specs_of,
)
from mambapeft_vision.benchmarks.mini_memba import VARIANTS, memba_jobs, memba_table
from mambapeft_vision.benchmarks.mini_settings import (
    BUDGET,
    RATES,
    SEARCH_TASKS,
    Setting,
    choices,
    refinements,
    setting_of,
)
from mambapeft_vision.commands import mini
from mambapeft_vision.results.bundle import read_bundle
from mambapeft_vision.results.record import RunRecord, is_derived
from mambapeft_vision.results.tables import find_records, read_standard
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.sweep import deadline
from mambapeft_vision.sweep.deadline import Follower, TimeUp, run_in_time
from mambapeft_vision.sweep.jobs import Job, State
from mambapeft_vision.sweep.pool import Queue, assignment_of
from mambapeft_vision.sweep.worker import Outcome
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.lock import locked

TINY = [
    *runs.SMALL_BACKBONE,
    "trainer.max_epochs=1",
    "trainer.warmup_epochs=0",
    "trainer.device=cpu",
    "dataset.batch_size=20",
    f"dataset.num_test={runs.TEST_IMAGES}",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tasks of the benchmark, with 40 images to train on, 30 of them without the 10 of val200."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("usps", "fashion"):
        task = runs.lay_out_task(folder / "mini" / name)
        lines = (task / "train800val200.txt").read_text().splitlines(keepends=True)
        (task / "train800.txt").write_text("".join(lines[:30]))
        (task / "val200.txt").write_text("".join(lines[30:]))
    return folder


def benchmark(data: Path, outputs: Path, **changes) -> Benchmark:
    given = {
        "methods": ["linear_probe", "lora_p_x"],
        "tasks": ["mini/usps", "mini/fashion"],
        "seeds": (0, 1),
        "rates": (1e-3, 1e-2),
        "search_tasks": ["mini/usps", "mini/fashion"],
        "overrides": [*TINY, f"paths.data={data}", f"paths.outputs={outputs}"],
    }
    return Benchmark(runs.CONFIGS, **{**given, **changes})


# Which runs


def test_presets_of_vim_s_fit_and_others_say_why_not():
    fitting, reasons = benchmark_methods(runs.CONFIGS)
    assert fitting[:3] == ["scratch", "full", "linear_probe"]  # in the order of the published table
    assert {"lora_p_x", "hybrid", "sdt", "memba", "prodial"} <= set(fitting)
    assert "lora_qv" in reasons
    assert not set(fitting) & set(reasons)
    assert len(fitting) + len(reasons) == len(list((runs.CONFIGS / "method").glob("*.yaml")))
    assert benchmark_methods(runs.CONFIGS, ["a", "scratch"])[0] == ["scratch", "a"]
    with pytest.raises(UserError, match="lora_qv is no method for vim_nano"):
        benchmark_methods(runs.CONFIGS, ["lora_qv"])
    with pytest.raises(UserError, match="backbone=vim_nan is unknown; did you mean vim_nano"):
        benchmark_methods(runs.CONFIGS, None, "vim_nan")


def test_the_published_runs_count_as_finished():
    """Of three presets, as all take a while: a change of what decides a run would have them run again."""
    published = {record.fingerprint for record in read_bundle(runs.ROOT / "results" / "mini" / "vim_nano.runs.json")}
    settings = Benchmark(runs.CONFIGS, ["lora_in_proj", "sdt", "hybrid"])
    for stage in ("recipe", "search"):
        jobs = jobs_of_stage(stage, settings)
        assert len(jobs) == {"recipe": 3 * 13 * 3, "search": 3 * 5 * 5}[stage]
        assert {job.plan.fingerprint for job in jobs} <= published


def test_planned_runs_are_those_of_the_train_command(tmp_path):
    """The quick way of planning gives what composing each run by itself gives: the same runs, never done twice."""
    settings = Benchmark(
        runs.CONFIGS,
        ["sdt", "hybrid"],
        tasks=["mini/usps", "mini/scene_count"],
        seeds=(0, 2),
        overrides=["dataset.num_workers=0"],
    )
    recipe, search = jobs_of_stage("recipe", settings), jobs_of_stage("search", settings)
    assert len(recipe) == 8 and len(search) == 2 * 5 * 5
    for job in [*recipe, *search[::13]]:
        alone = make_plan(runs.compose_train(job.overrides))
        sent = make_plan(assignment_of(job).cfg)
        assert job.plan.fingerprint == alone.fingerprint == sent.fingerprint
        assert job.plan.folder == alone.folder == sent.folder
        assert job.plan.config | {"sweep": None} == alone.config | {"sweep": None}
        assert job.plan.config == sent.config
    assert {job.plan.config["dataset"]["test_split"] for job in search} == {"val200"}
    assert {job.plan.seed for job in search} == {0}


def test_warm_up_phases_keep_their_share_of_the_run():
    settings = Benchmark(runs.CONFIGS, ["sdt"], tasks=["mini/usps"], seeds=(0,), overrides=["trainer.max_epochs=30"])
    (recipe,) = jobs_of_stage("recipe", settings)
    assert recipe.plan.config["method"]["sdt"]["warmup_steps"] == 150  # 500 of 3,200 steps are 150 of 30 x 32
    search = jobs_of_stage("search", settings)[0]
    assert search.plan.config["method"]["sdt"]["warmup_steps"] == 117  # of 30 x 25


def test_the_first_seed_of_everything_comes_first():
    settings = Benchmark(runs.CONFIGS, ["a", "d"], tasks=TASKS[:2], seeds=(0, 1))
    queue = Queue(jobs_of_stage("recipe", settings))
    taken = [queue.take(None, set()) for _ in range(len(queue))]
    assert [job.plan.seed for job in taken] == [0] * 4 + [1] * 4


def test_tuned_runs_at_the_recipe_s_rate_are_the_recipe_s_runs():
    settings = Benchmark(runs.CONFIGS, ["a", "d", "bias"], tasks=["mini/usps"], seeds=(0, 1))
    recipe = {job.folder for job in jobs_of_stage("recipe", settings)}
    chosen = {"a": [Setting(1e-3)], "d": [Setting(3e-3)]}  # bias has no choice yet
    tuned = {job.folder for job in jobs_of_stage("tuned", settings, chosen)}
    assert len(tuned) == 4 and len(tuned & recipe) == 2
    assert all("/a/" in str(folder) for folder in tuned & recipe)


# The choice


def test_the_best_mean_on_val200_is_chosen():
    val = {"train_split": "train800", "test_split": "val200"}

    def searched(preset: str, rate: float, scores: dict[str, float]):
        return [fake_record(t, preset, 0, s, trainer={"learning_rate": rate}, dataset=val) for t, s in scores.items()]

    records = [
        *searched("a", 1e-3, {"mini/usps": 0.9, "mini/fashion": 0.5}),  # mean 70
        *searched("a", 3e-3, {"mini/usps": 0.8, "mini/fashion": 0.7}),  # mean 75
        *searched("a", 1e-2, {"mini/usps": 0.8, "mini/fashion": 0.6}),  # mean 70
        *searched("d", 1e-3, {"mini/usps": 0.9, "mini/fashion": 0.5}),
        *searched("d", 3e-3, {"mini/usps": 0.9, "mini/fashion": 0.5}),
        *searched("d", 1e-2, {"mini/usps": 0.1, "mini/fashion": 0.5}),
        *searched("bias", 1e-3, {"mini/usps": 0.9, "mini/fashion": 0.5}),
        *searched("bias", 3e-3, {"mini/usps": 0.9}),  # not all tasks: no choice
        fake_record("mini/usps", "a", 0, 1.0, trainer={"learning_rate": 1e-3}),  # on test: does not count
    ]
    found = choices(records, read_standard(runs.CONFIGS), ("mini/usps", "mini/fashion"), (1e-3, 3e-3, 1e-2))
    assert found.keys() == {"a", "d"}
    assert found["a"].means == pytest.approx({Setting(1e-3): 70, Setting(3e-3): 75, Setting(1e-2): 70})
    assert (found["a"].setting, found["a"].at_edge) == (Setting(3e-3), False)
    assert (found["d"].setting, found["d"].at_edge) == (Setting(1e-3), True)  # of equally good ones the smallest


def test_every_method_has_the_same_number_of_trials():
    with_scale, without = (specs_of(runs.CONFIGS, name) for name in ("hybrid", "a"))
    scaled, plain = refinements(1e-2, with_scale), refinements(3e-2, without)
    assert len(RATES) + len(scaled) == len(RATES) + len(plain) == BUDGET
    assert {setting.scale for setting in scaled} == {1.0, 0.1, 10.0} and {setting.rate for setting in scaled} == {1e-2}
    assert [setting.rate for setting in plain if setting.decay is None] == [0.017, 0.1]  # between, and beyond the edge
    assert scaled[2].changes(with_scale).count("method.hybrid_lora_p_x.scale=0.01") == 1
    assert Setting(1e-2).changes(with_scale) == ["trainer.learning_rate=0.01"]


def test_a_refinement_is_chosen_once_all_of_a_method_s_are_done():
    standard, rates = read_standard(runs.CONFIGS), (1e-3, 1e-2)
    val = {"train_split": "train800", "test_split": "val200"}

    def searched(accuracy: float, rate: float, scale: float = 0.1, decay: float = 1e-4, **more):
        method = {"lora_p_x": specs_of(runs.CONFIGS, "lora_p_x")["lora_p_x"] | {"scale": scale} | more}
        trainer = {"learning_rate": rate, "weight_decay": decay}
        return fake_record("mini/usps", "lora_p_x", 0, accuracy, trainer=trainer, dataset=val, method=method)

    records = [searched(0.5, 1e-3), searched(0.6, 1e-2), searched(0.7, 1e-2, scale=1.0)]
    records += [searched(0.4, 1e-2, scale=0.01), searched(0.4, 1e-2, decay=1e-2)]
    records += [searched(0.9, 1e-3, rank=3)]  # another method
    assert choices(records, standard, ("mini/usps",), rates)["lora_p_x"].setting == Setting(1e-2)
    records.append(searched(0.4, 1e-2, decay=1e-1))
    choice = choices(records, standard, ("mini/usps",), rates)["lora_p_x"]
    assert choice.refined and choice.setting == Setting(1e-2, scale=10.0) and choice.rate == 1e-2
    assert setting_of(records[2], standard) == ("lora_p_x", Setting(1e-2, scale=10.0))
    assert setting_of(records[5], standard) is None


def test_refined_runs_are_those_of_the_train_command():
    settings = Benchmark(runs.CONFIGS, ["lora_p_x"], search_tasks=["mini/usps"])
    jobs = jobs_of_stage("refine", settings, {"lora_p_x": refinements(1e-2, specs_of(runs.CONFIGS, "lora_p_x"))})
    assert len({job.plan.fingerprint for job in jobs}) == 4
    assert [job.plan.config["method"]["lora_p_x"]["scale"] for job in jobs] == [0.1, 0.1, 0.01, 1.0]
    assert [job.plan.config["trainer"]["weight_decay"] for job in jobs] == [1e-2, 1e-1, 1e-4, 1e-4]
    assert make_plan(runs.compose_train(jobs[2].overrides)).fingerprint == jobs[2].plan.fingerprint


@pytest.mark.parametrize("backbone", ["mambareg_s", "vmamba_t"])
def test_any_backbone_can_be_named(backbone):
    settings = Benchmark(runs.CONFIGS, ["lora_p_x"], backbone, tasks=["mini/usps"], seeds=(0,))
    settings = dataclasses.replace(settings, overrides=["backbone.weights=random"])
    (job,) = jobs_of_stage("recipe", settings)
    name = {"mambareg_s": "mambareg_small_patch16_224", "vmamba_t": "vmamba_tiny_s1l8"}[backbone]
    assert job.plan.config["backbone"]["name"] == name and job.plan.config["method_sizes"] == "of_vim_s"


# Memba


def test_memba_s_variants_differ_in_one_part_and_are_told_apart():
    settings = Benchmark(runs.CONFIGS, ["memba"], rates=(1e-2,), search_tasks=SEARCH_TASKS[:1])
    jobs = memba_jobs(settings)
    assert len(jobs) == len(VARIANTS) == len({job.plan.fingerprint for job in jobs})

    def record(job: Job, accuracy: float, **trainer: float) -> RunRecord:
        trainer = {"learning_rate": 1e-2, **trainer}
        splits = {"train_split": "train800", "test_split": "val200"}
        method = job.plan.config["method"]
        return fake_record(job.plan.task, "memba", 0, accuracy, method=method, trainer=trainer, dataset=splits)

    records = [record(job, (10 + number) / 100) for number, job in enumerate(jobs)]
    of_scale = Wanted("memba", Setting(1e-2, scale=10.0), settings.search_tasks)
    trials = [record(jobs[0], 0.99, weight_decay=0.1), record(plan_runs(settings, [of_scale], [0])[0], 0.98)]
    table = memba_table([*records, *trials], read_standard(runs.CONFIGS), settings.search_tasks)
    assert [row[0] for row in table.rows] == list(VARIANTS)
    assert [row[1] for row in table.rows] == [f"{10 + number}.00" for number in range(len(jobs))]
    assert jobs[-1].plan.methods == ["memba_lora_in_proj", "memba_lora_out_proj"]


# In time


def test_no_run_begins_that_would_not_end_in_time(data, tmp_path):
    jobs = jobs_of_stage("recipe", benchmark(data, tmp_path))
    now = time.monotonic()
    assert run_in_time(jobs, 1, deadline=now - 1).records == []  # and no worker is started
    assert time.monotonic() - now < 5
    follower = Follower(2, deadline=now + 1000)
    follower.started(jobs[0])
    follower.begun[str(jobs[0].folder)] -= 990  # it took so long
    follower.ended(jobs[0], Outcome(None, "some error"))
    assert not follower.enough() or time.monotonic() - now > 9
    follower.took.append(1001.0)
    assert follower.enough()
    assert [job for job, _ in follower.failures] == [jobs[0]]
    with pytest.raises(TimeUp):
        Follower(1, deadline=now - 1).refresh()


def test_a_run_that_another_process_is_at_is_waited_for(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deadline, "RETRY_S", 0.1)
    jobs = jobs_of_stage("recipe", benchmark(data, tmp_path))[:2]
    jobs[0].folder.mkdir(parents=True)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(jobs[0].folder):
            held.set()
            free.wait(60)

    class Watched(Follower):
        def wait_for_others(self):
            if not free.is_set():
                assert (len(self.records), self.elsewhere) == (1, [jobs[0]])
                assert "1 with other processes" in self.state()
            free.set()
            holder.join()
            return super().wait_for_others()

    monkeypatch.setattr(deadline, "Follower", Watched)
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    follower = run_in_time(jobs, 1)
    assert {record.fingerprint for record in follower.records} == {job.plan.fingerprint for job in jobs}
    assert not follower.failures and not follower.elsewhere and "FAILED" not in capsys.readouterr().out


# End to end


def stage(data: Path, outputs: Path, name: str, *arguments: str) -> str:
    """What the command prints, in a process whose workers start quickly."""
    tasks = "mini/usps,mini/fashion"
    common = ["--methods=linear_probe,lora_p_x", f"--tasks={tasks}", f"--search-tasks={tasks}", "--seeds=0,1"]
    options = [*common, "--rates=1e-3,1e-2", *TINY, f"paths.data={data}", f"paths.outputs={outputs}"]
    code, out, err = crashes.command(outputs.parent, "scripts/mini_benchmark.py", name, *options, *arguments)
    assert code == 0, err
    return out


def test_the_stages_from_start_to_bundle(data, tmp_path):
    outputs = tmp_path / "outputs"
    assert "8 runs (8 new)" in stage(data, outputs, "recipe", "--dry-run") and not outputs.exists()
    assert "recipe is complete" in stage(data, outputs, "recipe", "--workers=1")
    said = stage(data, outputs, "search")
    assert "8 runs (8 new)" in said and "search is complete" in said and "lora_p_x " in said
    records = find_records([outputs])
    assert len(records) == 16
    settings = benchmark(data, outputs)
    found = choices(records, read_standard(runs.CONFIGS), settings.search_tasks, settings.rates)
    tuned = jobs_of_stage("tuned", settings, {name: [choice.setting] for name, choice in found.items()})
    assert len(tuned) == 8
    at_recipe = sum(choice.rate == 1e-3 for choice in found.values())
    assert sum(job.state is State.FINISHED for job in tuned) == 4 * at_recipe
    only = "--rates=1e-3"  # with one rate the tuned runs are the recipe's
    assert "best 2 methods on mini/usps, seed 1: " in stage(data, outputs, "ensemble", "--best=2", only)
    options = ["--best=1", "--device=cpu", f"--cache={data}/cache", only]
    assert "lora_p_x: α " in stage(data, outputs, "interpolate", *options)
    derived = [record for record in find_records([outputs]) if is_derived(record)]
    labels = Counter((r.config["derived"]["kind"], r.config["derived"]["label"]) for r in derived)
    assert labels["ensemble", "2 seeds"] == 2 * 2 and labels["ensemble", "best 2 methods"] == 2 * 2
    assert sum(number for (kind, _), number in labels.items() if kind == "interpolation") == 4
    assert "16 runs (16 new)" in stage(data, outputs, "refine", "--dry-run")  # four trials of two methods on two tasks
    records = find_records([outputs])
    bundle = tmp_path / "mini.runs.json"
    mini.main(["pack", str(outputs), f"--out={bundle}", "--backbone=vim_pico"])  # which the tiny runs have
    with pytest.raises(UserError, match="no finished run of a mini task with vim_nano"):
        mini.main(["pack", str(outputs)])
    assert json.loads(bundle.read_text())["format"] == 1
    key = lambda record: (record.fingerprint, record.seed)  # noqa: E731
    assert sorted(find_records([bundle]), key=key) == sorted(records, key=key)


def test_one_command_runs_every_stage_and_stops_where_one_is_not_done(data, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    few = ["--methods=linear_probe,lora_p_x", "--tasks=mini/usps", "--search-tasks=mini/usps", "--seeds=0,1"]
    options = [*few, "--rates=1e-3", "--best=1", "--device=cpu", f"--cache={data}/cache", *TINY]

    def said(*arguments: str) -> str:
        assert not mini.main(["all", *options, f"paths.data={data}", f"paths.outputs={outputs}", *arguments])
        return capsys.readouterr().out

    planned = said("--dry-run")
    assert "recipe, planned after" in planned and "tuned, planned after" in planned and not outputs.exists()
    assert "is complete" not in said("--max-minutes=0") and not outputs.exists()
    done = said()
    places = [done.index(f"{name} is complete") for name in ("recipe", "search", "refine", "tuned")]
    assert places == sorted(places)
    assert " on mini/usps: " in done[places[-1] :] and ": α " in done[places[-1] :]
    assert any(is_derived(record) for record in find_records([outputs]))
    assert "ensembles and interpolations are left" in said("--max-minutes=0")
    bundle = tmp_path / "mini.runs.json"
    mini.main(["pack", str(outputs), f"--out={bundle}", "--backbone=vim_pico"])
    mini.main(["unpack", str(bundle), f"--out={tmp_path}/elsewhere"])
    unpacked = said(f"paths.outputs={tmp_path}/elsewhere")
    assert "no ensembles: no tuned runs with stored probabilities are here" in unpacked
    assert "lora_p_x: its runs are not here, only their results" in unpacked


@pytest.mark.parametrize("command, place", [("pack", "outputs"), ("document", "results/mini")])
def test_each_command_looks_where_its_help_says(command, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(place).mkdir(parents=True)
    with pytest.raises(UserError, match=f"below {place};"):
        mini.main([command])
