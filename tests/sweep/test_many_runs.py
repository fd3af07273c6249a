"""Bookkeeping of sweeps grows linearly, and what is made in few steps is what each step alone would make."""

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import runs
from helpers.fake_records import CONFIGS, fake_record

from mambapeft_vision.results import plots
from mambapeft_vision.results.explorer import explorer, read_names
from mambapeft_vision.results.tables import collect, read_standard, tables_of, to_csv, to_markdown
from mambapeft_vision.results.tables.find import Found
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.sweep.display import Display
from mambapeft_vision.sweep.estimates import Speeds
from mambapeft_vision.sweep.jobs import Job, State, plan_jobs
from mambapeft_vision.sweep.pool import Queue
from mambapeft_vision.sweep.worker import Outcome

SWEEP = ["method=lora_p_x,a,[a,d]", "dataset=vtab/cifar,vtab/dtd,mini/digits", "seed=0,1", "paths.outputs=/nowhere"]


def every_choice_once(jobs: list[Job]) -> list[Job]:
    """A few of the jobs, drawn so that every override of any is one of theirs."""
    chosen: list[Job] = []
    missing = {override for job in jobs for override in job.overrides}
    for job in random.Random(0).sample(jobs, len(jobs)):
        if missing & set(job.overrides):
            missing -= set(job.overrides)
            chosen.append(job)
    return chosen


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["trainer.learning_rate=0.001,0.01"],
        ["dataset.batch_size=16,32"],
        ["backbone=vim_s,vim_ti"],
        ["+method.lora_p_x.lr_mult=0.1,1.0", "method=lora_p_x"],
        ["+trainer.nothing=0"],
    ],
)
def test_runs_are_planned_as_each_alone_would_be(more):
    """Tasks and other choices are composed apart where they do not depend on each other."""
    if more == ["+trainer.nothing=0"]:
        with pytest.raises(Exception, match="nothing"):
            plan_jobs([*SWEEP, *more], CONFIGS)
        return
    keys = {text.partition("=")[0] for text in more}
    jobs = plan_jobs([*(text for text in SWEEP if text.partition("=")[0] not in keys), *more], CONFIGS)
    assert len({job.folder for job in jobs}) == len(jobs) >= 12
    for job in every_choice_once(jobs):
        for plan in (make_plan(job.config()), make_plan(runs.compose_train(job.overrides))):
            assert (plan.folder, plan.fingerprint) == (job.plan.folder, job.plan.fingerprint)
            assert {**plan.config, "sweep": None} == {**job.plan.config, "sweep": None}


@pytest.fixture(scope="module")
def job() -> Job:
    return plan_jobs(["method=a", "dataset=vtab/cifar", "seed=0", "paths.outputs=/nowhere"], CONFIGS)[0]


def many_jobs(job: Job, count: int) -> list[Job]:
    """Runs of different seeds on 20 tasks."""

    def one(number: int) -> Job:
        config = {
            **job.plan.config,
            "seed": number,
            "dataset": {**job.plan.config["dataset"], "num_classes": number % 20},
        }
        plan = replace(job.plan, config=config, folder=Path("/nowhere") / str(number))
        return replace(job, plan=plan, label=str(number), turn=number % 3)

    return [one(number) for number in range(count)]


def many_records(count: int) -> list:
    record = fake_record("vtab/cifar", "a", 0, 0.5)
    return [replace(record, seed=seed, accuracy=seed / count) for seed in range(count)]


def follow_a_sweep(job: Job, count: int) -> None:
    """All that the parent does for a sweep of `count` runs over as many results, but for the runs."""
    jobs = many_jobs(job, count)
    display = Display(jobs, 0, Speeds(many_records(count)), workers=2)
    queue, ended = Queue(jobs), Outcome(many_records(1)[0])
    while queue:
        taken = queue.take(None, set())
        display.started(taken)
        display.ended(taken, ended)
    assert display.state().startswith(f"{count} done")


def tables_of_many(job: Job, count: int) -> None:
    """A row for each run, as a search leaves them."""
    record = fake_record("vtab/cifar", "a", 0, 0.5)
    records = [
        replace(record, config=record.config | {"trainer": record.config["trainer"] | {"learning_rate": n / 1e5}})
        for n in range(1, count)
    ]
    collections = collect(records, read_standard(CONFIGS))
    assert sum(len(c.rows) for c in collections) == count - 1
    for collection in collections:
        for table in tables_of(collection):
            to_markdown(table)
        plots.accuracy_against_parameters(collection)
    to_csv(collections)


def tables_of_many_tasks(job: Job, count: int) -> None:
    record = fake_record("custom/x", "a", 0, 0.5)
    records = [replace(record, task=f"custom/t{n}") for n in range(count)]
    collections = collect(records, read_standard(CONFIGS))
    assert len(collections[0].tasks) == count and len(tables_of(collections[0])) == 2
    to_csv(collections)


def plan_many(job: Job, count: int) -> None:
    seeds = ",".join(map(str, range(count)))
    jobs = plan_jobs(["method=a", "dataset=vtab/cifar", f"seed={seeds}", "paths.outputs=/nowhere"], CONFIGS)
    assert len(jobs) == count


def explorer_of_many(job: Job, count: int) -> None:
    record = fake_record("vtab/cifar", "a", 0, 0.5)
    found = [Found(replace(record, seed=seed), Path("/nowhere") / str(seed)) for seed in range(count)]
    page = explorer(found, read_standard(CONFIGS), read_names(CONFIGS), title="many")
    assert len(page) > 100 * count


@pytest.mark.parametrize(
    ("work", "count"),
    [
        (plan_many, 1500),
        (explorer_of_many, 1500),
        (follow_a_sweep, 1500),
        (tables_of_many, 1000),
        (tables_of_many_tasks, 4000),
    ],
)
def test_twice_the_runs_take_twice_the_time(work, count, job, capsys):
    """CPU time; what is quadratic takes four times as long."""
    work(job, count // 4)  # imports and caches
    ratios = []
    for _ in range(4):
        times = []
        for size in (count, 2 * count):
            started = time.process_time()
            work(job, size)
            times.append(time.process_time() - started)
        ratios.append(times[1] / times[0])
        if ratios[-1] < 2.6:
            return
    pytest.fail(f"ratios {ratios}")


def test_pictures_of_many_rows_can_be_read():
    """2,200 rows had a picture of more than 65,535 pixels, which no PNG of matplotlib's can have."""
    record = fake_record("custom/x", "a", 0, 0.5)
    records = [
        replace(
            record,
            task=f"custom/t{task}",
            accuracy=n / 300,
            config=record.config | {"trainer": record.config["trainer"] | {"learning_rate": (n + 1) / 1e5}},
        )
        for n in range(250)
        for task in range(2)
    ]
    (collection,) = collect(records, read_standard(CONFIGS))
    bars = plots.task_bars(collection)
    panel = bars.axes[0]
    assert len(panel.patches) == plots.MOST_ROWS and "the best 100 of 250 rows" in bars.get_suptitle()
    assert min(bar.get_width() for bar in panel.patches) == pytest.approx(100 * 150 / 300)
    scatter = plots.accuracy_against_parameters(collection)
    assert len(scatter.axes[0].collections[0].get_offsets()) == 250  # every point, the best with a number
    assert len(scatter.axes[0].texts) == plots.MOST_ROWS
    assert bars.get_size_inches()[1] < 60


def test_a_worker_is_given_runs_in_turn(job):
    jobs = many_jobs(job, 60)
    queue = Queue(jobs)
    turns = [queue.take(None, set()).turn for _ in range(60)]
    assert turns == sorted(turns) and not queue
    assert jobs[0].state is State.NEW
