"""The mini benchmark: its runs are train.py's, its choices those of the numbers, and its script works end to end."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
from helpers import runs
from helpers.fake_records import fake_record

from mambapeft_vision.benchmarks.mini import (
    TASKS,
    Benchmark,
    benchmark_methods,
    choices,
    jobs_of_stage,
)
from mambapeft_vision.results.tables import find_records, read_standard
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.sweep.deadline import Follower, TimeUp, run_in_time
from mambapeft_vision.sweep.jobs import State
from mambapeft_vision.sweep.pool import Queue, assignment_of
from mambapeft_vision.sweep.worker import Outcome
from mambapeft_vision.utils.errors import UserError

SCRIPT = runs.ROOT / "scripts" / "mini_benchmark.py"
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
    tuned = {job.folder for job in jobs_of_stage("tuned", settings, {"a": 1e-3, "d": 3e-3})}  # bias has no choice yet
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
    found = choices(records, read_standard(runs.CONFIGS), ("mini/usps", "mini/fashion"), rates=3)
    assert found.keys() == {"a", "d"}
    assert found["a"].means == pytest.approx({1e-3: 70, 3e-3: 75, 1e-2: 70})
    assert (found["a"].rate, found["a"].at_edge) == (3e-3, False)
    assert (found["d"].rate, found["d"].at_edge) == (1e-3, True)  # of equally good ones the smallest


# In time


def test_no_run_begins_that_would_not_end_in_time(data, tmp_path):
    jobs = jobs_of_stage("recipe", benchmark(data, tmp_path))
    now = time.monotonic()
    assert run_in_time(jobs, 1, deadline=now - 1).records == []  # and no worker is started
    assert time.monotonic() - now < 5
    follower = Follower(2, deadline=now + 1000)
    follower.started(jobs[0])
    follower._begun[str(jobs[0].folder)] -= 990  # it took so long
    follower.ended(jobs[0], Outcome(None, "some error"))
    assert not follower.enough() or time.monotonic() - now > 9
    follower._took.append(1001.0)
    assert follower.enough()
    assert [job for job, _ in follower.failures] == [jobs[0]]
    with pytest.raises(TimeUp):
        Follower(1, deadline=now - 1).refresh()


# End to end


@pytest.fixture(scope="module")
def script():
    """scripts/mini_benchmark.py as a module: its commands start worker processes, but need no process of their own."""
    spec = importlib.util.spec_from_file_location("mini_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(script, data: Path, outputs: Path, *arguments: str) -> None:
    tasks = "mini/usps,mini/fashion"
    common = ["--methods=linear_probe,lora_p_x", f"--tasks={tasks}", f"--search-tasks={tasks}", "--seeds=0,1"]
    options = [*common, "--rates=1e-3,1e-2", *TINY, f"paths.data={data}", f"paths.outputs={outputs}"]
    script.main([arguments[0], *options, *arguments[1:]])


def test_the_stages_from_start_to_bundle(script, data, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    command(script, data, outputs, "recipe", "--dry-run")
    assert "8 runs (8 new)" in capsys.readouterr().out and not outputs.exists()
    command(script, data, outputs, "recipe", "--workers=1")
    assert "recipe is complete" in capsys.readouterr().out
    command(script, data, outputs, "search")
    said = capsys.readouterr().out
    assert "8 runs (8 new)" in said and "search is complete" in said and "lora_p_x " in said
    records = find_records([outputs])
    assert len(records) == 16
    settings = benchmark(data, outputs)
    found = choices(records, read_standard(runs.CONFIGS), settings.search_tasks, rates=2)
    tuned = jobs_of_stage("tuned", settings, {name: choice.rate for name, choice in found.items()})
    assert len(tuned) == 8
    at_recipe = sum(choice.rate == 1e-3 for choice in found.values())
    assert sum(job.state is State.FINISHED for job in tuned) == 4 * at_recipe
    bundle = tmp_path / "mini.runs.json"
    script.main(["pack", str(outputs), f"--out={bundle}"])
    assert json.loads(bundle.read_text())["format"] == 1
    key = lambda record: (record.fingerprint, record.seed)  # noqa: E731
    assert sorted(find_records([bundle]), key=key) == sorted(records, key=key)
