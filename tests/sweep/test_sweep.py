"""Sweeps as they are used: planned, killed, interrupted, gone on with, with runs that crash."""

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import crashes, runs
from helpers.fake_records import fake_record
from helpers.stand_ins import with_gpus
from hydra.errors import HydraException
from rich.console import Console

from mambapeft_vision.adapter.presets import read_presets
from mambapeft_vision.results.paper import PUBLISHED, VIM_S
from mambapeft_vision.results.record import read_record, write_record
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.sweep import worker
from mambapeft_vision.sweep.display import Display
from mambapeft_vision.sweep.estimates import Speeds, read_rates
from mambapeft_vision.sweep.jobs import Job, State, plan_jobs
from mambapeft_vision.sweep.pool import Queue, assignment_of, visible_gpus
from mambapeft_vision.sweep.sweep import Command, longest_first, parse, sweep
from mambapeft_vision.sweep.worker import Outcome
from mambapeft_vision.sweep.worker_cache import Kept, task_key
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.progress import format_duration

SCRIPT = "scripts/sweep_vtab1k.py"
SWEEP, SWEPT = ["method=linear_probe,lora_p_x,a,bias", "seeds=0,1"], 16  # runs, on two tasks
CRASHING_METHOD = """
import os
import sys

from mambapeft_vision.methods.linear_probe import LinearProbe


def die_when_done(event, arguments):
    if event == "os.remove" and str(arguments[0]).endswith("checkpoint.ckpt"):  # result.json is written
        os.kill(os.getpid(), 9)


class Crashing(LinearProbe):
    def __init__(self, *, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "raise":
            raise RuntimeError("this method cannot be built")
        if how == "die":
            os.kill(os.getpid(), 9)
        if how == "die when done":
            sys.addaudithook(die_when_done)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tasks, custom/one and custom/two."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("one", "two"):
        runs.lay_out_task(folder / "custom" / name)
    return folder


def arguments(data: Path, outputs: Path, *more: str) -> list[str]:
    return [
        *runs.SMALL_BACKBONE,
        "dataset=folder",
        "dataset.name=custom/one,custom/two",
        "dataset.folder=${paths.data}/${dataset.name}",
        f"dataset.num_classes={runs.CLASSES}",
        "dataset.batch_size=16",
        "trainer.max_epochs=2",
        "trainer.warmup_epochs=1",
        "trainer.device=cpu",
        "trainer.checkpoint_every_s=0",
        f"paths.data={data}",
        f"paths.outputs={outputs}",
        *more,
    ]


@dataclasses.dataclass(frozen=True)
class NewProcess:
    """As `crashes.Command`, but neither it nor its workers are forked."""

    process: subprocess.Popen

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


def begin_anew(folder: Path, script: str, *command: str) -> NewProcess:
    return NewProcess(
        subprocess.Popen(
            [sys.executable, str(runs.ROOT / script), *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=runs.heed_ctrl_c,
        )
    )


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:  # machines can be busy
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def results(outputs: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in outputs.rglob("result.json")}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Planning


def planned(data: Path, outputs: Path, *more: str) -> list[Job]:
    return plan_jobs(parse(arguments(data, outputs, *more)).overrides, runs.CONFIGS)


def test_every_choice_is_planned_once(data, tmp_path):
    jobs = planned(data, tmp_path, "method=lora_p_x,[a,d]", "seeds=0,1,0")
    assert {(job.plan.task, job.plan.method_names, job.plan.seed) for job in jobs} == {
        (task, method, seed)
        for task in ("custom/one", "custom/two")
        for method in ("lora_p_x", "a+d")
        for seed in (0, 1)
    }
    assert len(jobs) == 8 and {job.state for job in jobs} == {State.NEW}
    assert jobs[0].label == "custom/one lora_p_x seed 0"
    assert all(job.plan.config["dataset"]["seed"] == job.plan.seed for job in jobs)
    assert all(make_plan(runs.compose_train(job.overrides)).folder == job.folder for job in jobs)


def test_the_default_is_all_tasks_of_vtab(tmp_path):
    jobs = plan_jobs(["method=lora_p_x", f"paths.outputs={tmp_path}"], runs.CONFIGS)
    assert len({job.plan.task for job in jobs}) == len(jobs) == 19


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("workers=0", "workers: '0'; expected a whole number of at least 1"),
        ("--workers=two", "workers: 'two'; expected a whole number"),
        ("--dry", "--dry is unknown; did you mean --dry-run"),
        ("lora_p_x", "lora_p_x is unknown; expected key=value"),
    ],
)
def test_mistakes_in_the_command_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        parse([wrong])


def test_options_have_two_spellings():
    spelled = [
        parse(["method=a", *options]) for options in (["workers=2", "seeds=0,1"], ["--workers", "2", "--seeds=0,1"])
    ]
    assert spelled[0] == spelled[1] and spelled[0].workers == 2 and spelled[0].overrides == ["method=a", "seed=0,1"]


def test_a_mistake_in_one_run_stops_before_any_runs(data, tmp_path):
    with pytest.raises(HydraException, match="lora_p_y"):
        planned(data, tmp_path, "method=lora_p_x,lora_p_y")
    with pytest.raises(UserError, match="matches nothing"):
        planned(data, tmp_path, "method=glob(no_such*)")
    assert not list(tmp_path.iterdir())


def test_globs_choose_options(data, tmp_path):
    jobs = plan_jobs(
        [f"paths.outputs={tmp_path}", "dataset=glob(vtab/s*)", "method=glob(lora_p_*,exclude=*base)"], runs.CONFIGS
    )
    assert {job.plan.task for job in jobs} == {
        f"vtab/{t}" for t in ("svhn", "sun397", "smallnorb_azi", "smallnorb_ele")
    }
    assert {job.plan.method_names for job in jobs} == {f"lora_p_{part}" for part in "bcdxz"}


# Order and time


def test_a_worker_gets_runs_of_the_task_that_it_holds(data, tmp_path):
    jobs = planned(data, tmp_path, "method=a,d")
    one, two = jobs[0], jobs[2]
    queue = Queue(jobs)
    assert queue.take(task_key(two.plan), set()) is two
    assert queue.take(None, {task_key(one.plan)}).plan.task == "custom/two"
    assert queue.take(None, {task_key(one.plan)}) is one  # rather than nothing


def test_the_longest_task_comes_first(data, tmp_path):
    jobs = planned(data, tmp_path, "method=a", "seeds=0,1")
    one, two = jobs[:2], jobs[2:]
    assert {job.plan.task for job in one} == {"custom/one"}
    assert longest_first(jobs, Speeds()) == jobs  # nothing is known
    backbone = {"name": jobs[0].plan.config["backbone"]["name"]}
    record = fake_record("custom/two", "a", 0, 0.5, backbone=backbone)
    other = dataclasses.replace(record, task="custom/one", wall_seconds=record.wall_seconds / 2)
    assert longest_first(jobs, Speeds([record, other])) == [*two, *one]
    sized = [with_test_images(job, 1 + number // 2) for number, job in enumerate(jobs)]
    assert longest_first(sized, Speeds()) == [*sized[2:], *sized[:2]]


def with_test_images(job: Job, count: int) -> Job:
    config = {**job.plan.config, "dataset": {**job.plan.dataset, "num_test": count}}
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, config=config))


def test_time_is_estimated_from_the_runs_most_alike(data, tmp_path):
    plan = planned(data, tmp_path, "method=a")[0].plan  # two epochs
    # per epoch 1 s; test of 100 images at 2,000/s 0.05 s; other 120 - 100 - 0.05 s
    near = fake_record("custom/one", "a", 0, 0.5, backbone={"name": plan.config["backbone"]["name"]})
    far = fake_record(
        "custom/one",
        "d",
        0,
        0.5,
        backbone={"name": plan.config["backbone"]["name"]},
        train_seconds=1e4,
        wall_seconds=2e4,
    )
    assert Speeds([near, far]).seconds(plan) == pytest.approx(2 + 0.05 + 19.95)
    assert Speeds([far]).seconds(plan) == pytest.approx(200 + 0.05 + 9999.95)
    assert Speeds([fake_record("custom/one", "a", 0, 0.5)]).seconds(plan) is None


RATES = """# a comment
backbone,preset,train_images_per_second,test_images_per_second
vim_small_patch16_224,a,2000,5000
vim_small_patch16_224,*,1000,5000
"""


def test_time_is_estimated_from_measured_rates_before_anything_has_run(tmp_path, capsys):
    (tmp_path / "rates.csv").write_text(RATES)
    command = ["method=a,hybrid", "seeds=0,1,2", f"rates={tmp_path / 'rates.csv'}", "workers=2", "--dry-run"]
    parsed = parse([*command, f"paths.outputs={tmp_path / 'out'}"], runs.CONFIGS)
    jobs = plan_jobs(parsed.overrides, runs.CONFIGS)
    # 3 seeds, 19 tasks of 1,000 training images, 100 epochs, 387,905 test images; 2,000 and 1,000 images/s in training
    expected = 3 * (19 * 100_000 / 2000 + 387_905 / 5000) + 3 * (19 * 100_000 / 1000 + 387_905 / 5000)
    assert Speeds(rates=parsed.rates).total(job.plan for job in jobs) == pytest.approx(expected)
    sweep(jobs, parsed)
    assert f"about {format_duration(expected / 2)} with 2 at a time" in capsys.readouterr().out
    alike = fake_record("vtab/cifar", "a", 0, 0.5)
    plan = next(job.plan for job in jobs if job.plan.task == "vtab/cifar" and job.plan.methods == ["a"])
    assert Speeds([alike], parsed.rates).seconds(plan) == pytest.approx(120.0)  # a record counts more: it took 120 s
    (validation,) = plan_jobs(
        ["method=a", "dataset=vtab/dmlab", "dataset.train_split=train800", "dataset.test_split=val200"], runs.CONFIGS
    )
    assert Speeds(rates=parsed.rates).seconds(validation.plan) == pytest.approx(80_000 / 2000 + 200 / 5000)


def test_the_committed_rates_tell_of_the_whole_table():
    rates = read_rates(runs.ROOT / "docs" / "rates.csv", read_presets(runs.CONFIGS / "method"))
    methods = ",".join(row.presets[0] for row in PUBLISHED[VIM_S])
    jobs = plan_jobs([f"method={methods}", "dataset=vtab/cifar"], runs.CONFIGS)
    assert len(jobs) == 30 and Speeds(rates=rates).total(job.plan for job in jobs) > 0


def test_the_committed_rates_are_those_that_were_measured():
    with open(runs.ROOT / "docs" / "training.csv", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
        measured = {row["method"]: row["train_images_per_s"] for row in rows if row["batch"] == "32"}
    with open(runs.ROOT / "docs" / "rates.csv", newline="") as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        of_vim_s = [line for line in lines if line["backbone"] == "vim_small_patch16_224"]
        told = {line["preset"]: line["train_images_per_second"] for line in of_vim_s}
    slowest = told.pop("*")
    assert told == measured and slowest in measured.values()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("preset,rate\n", "expected backbone,preset"),
        (RATES.replace(",a,", ",aa,"), "'aa' is no preset"),
        (RATES.replace("2000", "0"), "two numbers above 0"),
        (RATES.replace("2000,", ""), "two numbers above 0"),
    ],
)
def test_mistakes_in_a_file_of_rates_are_named(tmp_path, wrong, message):
    (tmp_path / "rates.csv").write_text(wrong)
    with pytest.raises(UserError, match=message):
        read_rates(tmp_path / "rates.csv", read_presets(runs.CONFIGS / "method"))


def test_gpus_are_those_that_this_process_sees(monkeypatch):
    with_gpus(monkeypatch, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]


# Running


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in Linux's /proc")
@pytest.mark.parametrize(
    "begin", [crashes.begin, pytest.param(begin_anew, marks=pytest.mark.exhaustive)], ids=["forked", "anew"]
)
def test_killed_and_interrupted_the_same_command_goes_on(data, tmp_path, begin):
    """A sweep is killed, then interrupted, then finished by the same command, started twice."""
    command = arguments(data, tmp_path, *SWEEP)

    process = crashes.begin(tmp_path, SCRIPT, *command, "workers=2").process
    wait_until(lambda: len(results(tmp_path)) >= 2)  # few: a busy machine may let this process wait for long
    workers = children(process.pid)
    process.kill()
    process.join()
    wait_until(lambda: not any(map(alive, workers)), seconds=60)
    after_kill = results(tmp_path)
    assert 2 <= len(after_kill) < SWEPT

    begun = begin(tmp_path, SCRIPT, *command, "workers=2")
    wait_until(lambda: len(results(tmp_path)) >= len(after_kill) + 1)
    workers = children(begun.process.pid)
    os.killpg(begun.process.pid, signal.SIGINT)  # as a terminal does
    code, _, err = begun.end()
    assert code == 130 and "Traceback" not in err, err
    wait_until(lambda: not any(map(alive, workers)), seconds=60)
    after_interrupt = results(tmp_path)
    assert len(after_interrupt) < SWEPT

    # As on two machines with a common folder.
    both = [crashes.begin(tmp_path, SCRIPT, *command) for _ in range(2)]
    ended = [process.end() for process in both]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert any(f"{len(after_interrupt)} of them finished before" in out for _, out, _ in ended)
    final = results(tmp_path)
    assert len(final) == SWEPT
    assert {file: final[file] for file in after_kill} == after_kill
    assert {file: final[file] for file in after_interrupt} == after_interrupt
    assert not list(tmp_path.rglob("*.replaced-*")) and not list(tmp_path.rglob("checkpoint.ckpt"))

    jobs = plan_jobs(parse(command).overrides, runs.CONFIGS)
    assert {job.state for job in jobs} == {State.FINISHED}

    # A run in a sweep is the run that train.py does, to the last bit, whatever ran before it in its process.
    for job in jobs[-3:]:
        alone = runs.run([*job.overrides, f"paths.outputs={tmp_path / 'alone'}"])
        assert alone.accuracy == read_record(job.folder).accuracy and alone.loss == read_record(job.folder).loss
        tensors = runs.read_adapter_tensors(tmp_path / "alone" / job.folder.relative_to(tmp_path))
        assert all(torch.equal(tensors[k], v) for k, v in runs.read_adapter_tensors(job.folder).items())


def test_the_live_table_tells_what_is_done_running_and_failed(data, tmp_path, capsys):
    jobs = planned(data, tmp_path, "method=a,d", "seeds=0,1")
    known = [fake_record("custom/one", "a", 0, 0.5, backbone={"name": jobs[0].plan.config["backbone"]["name"]})]
    display = Display(jobs, finished=2, speeds=Speeds(known), workers=2)
    for job in jobs[:4]:
        display.started(job)
    jobs[3].folder.mkdir(parents=True)
    (jobs[3].folder / "metrics.csv").write_text("epoch,images_per_second\n0,321.0\n")
    display.ended(jobs[0], Outcome(known[0]))
    display.ended(jobs[1], Outcome(None, "RuntimeError: no luck"))
    display.ended(jobs[2], Outcome(None, "in use", elsewhere=True))
    # Five runs are left of about 22 s each (see above), two at a time; the one that runs has just begun.
    assert display.state() == (
        "1 done (and 2 before), 1 running, 4 waiting, 1 failed, 1 left to other processes, 321 images/s, "
        "about 0:55 left"
    )
    assert display.failures == [(jobs[1], "RuntimeError: no luck")]
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["begins"] * 4 + ["done", "FAILED", "skipped"]
    console = Console(width=120, file=io.StringIO())
    console.print(display.table())
    text = console.file.getvalue()
    assert f"{jobs[3].label}" in text and "1/2" in text and "321" in text and "no luck" in text


def carry_out(job: Job) -> Outcome:
    """As a worker does."""
    return worker.run(assignment_of(job), Kept())


@pytest.mark.slow
def test_crashed_runs_are_recorded_and_the_others_done(data, tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "crashing.py").write_text(CRASHING_METHOD)
    command = arguments(
        data,
        tmp_path / "out",
        "method=linear_probe",
        "dataset.name=custom/one",
        f"paths.methods={tmp_path / 'methods'}",
        "+method.crashing._target_=mambapeft_vision.methods.crashing.Crashing",
        "+method.crashing.how=raise,die,not,die when done",
    )
    code, out, _ = crashes.command(tmp_path, SCRIPT, *command)
    assert code == 1 and "2 of the runs failed" in out and "2 done" in out
    failures = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("failure.json")]
    assert sorted(failure["error"] for failure in failures) == [
        "RuntimeError: this method cannot be built",
        "the worker process was ended by signal 9; out of memory?",
    ]
    assert all("+method.crashing.how=" in " ".join(failure["overrides"]) for failure in failures)
    assert any("in __init__" in failure["traceback"] for failure in failures)
    assert len(results(tmp_path / "out")) == 2
    for result in results(tmp_path / "out"):  # also where the worker was killed right after it
        assert not {"failure.json", "checkpoint.ckpt"} & set(os.listdir(result.parent))


def test_a_run_killed_right_after_its_result_is_tidied_by_the_next_sweep(data, tmp_path):
    job = planned(data, tmp_path, "method=linear_probe", "dataset.name=custom/one")[0]
    carry_out(job)
    (job.folder / "checkpoint.ckpt").touch()
    (again, *_) = planned(data, tmp_path, "method=linear_probe", "dataset.name=custom/one")
    assert sweep([again], Command([])) == 0
    assert not (job.folder / "checkpoint.ckpt").exists()


def test_a_failed_run_is_tried_again_and_its_note_goes(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    image = tmp_path / "data" / "custom" / "one" / "images" / "train800val200" / "000007.png"
    image.rename(image.with_suffix(".away"))
    job = planned(tmp_path / "data", tmp_path / "out", "method=linear_probe")[0]
    outcome = carry_out(job)
    assert outcome.record is None and "000007.png" in outcome.error
    assert json.loads((job.folder / "failure.json").read_text())["error"] == outcome.error
    assert not outcome.last  # a mistake in the data does no harm to the process
    image.with_suffix(".away").rename(image)
    (again, *_) = planned(tmp_path / "data", tmp_path / "out", "method=linear_probe")
    assert again.state is State.NEW
    assert carry_out(again).record is not None and not (job.folder / "failure.json").exists()


def test_runs_on_other_images_are_done_again(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    command = arguments(tmp_path / "data", tmp_path / "out", "method=linear_probe")
    for job in plan_jobs(command, runs.CONFIGS):
        runs.run(job.overrides)
    assert {job.state for job in plan_jobs(command, runs.CONFIGS)} == {State.FINISHED}
    file = tmp_path / "data" / "custom" / "one" / "test.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    one, two = plan_jobs(command, runs.CONFIGS)
    assert (one.state, two.state) == (State.OUTDATED, State.FINISHED)
    capsys.readouterr()
    sweep([one, two], Command(command, dry_run=True))
    assert "1 outdated, 1 finished" in capsys.readouterr().out
    outcome = worker.run(assignment_of(one), Kept())
    assert outcome.record.num_test == 19
    assert read_record(one.folder.with_name(f"{one.folder.name}.replaced-1")).num_test == 20


def test_runs_on_other_weights_are_done_again(data, tmp_path):
    command = arguments(data, tmp_path, "method=linear_probe", "dataset.name=custom/one")
    (job,) = plan_jobs(command, runs.CONFIGS)
    record = runs.run(job.overrides)
    write_record(job.folder, dataclasses.replace(record, backbone_sha256="0" * 64))
    (job,) = plan_jobs(command, runs.CONFIGS)
    assert job.state is State.OUTDATED


def test_what_is_kept_is_shared_and_stays_clean(data, tmp_path):
    """Two runs of a task have the same images in memory, and the backbone that the first one changed is not reused."""
    jobs = planned(data, tmp_path, "method=a,d")
    kept = Kept()
    first, second = (kept.sources.task(job.plan) for job in jobs[:2])
    assert first is second and kept.sources.task(jobs[2].plan) is not first
    backbones = [kept.sources.backbone(job.plan) for job in jobs[:2]]
    backbones[0].pos_embed.data.zero_()
    assert backbones[1].pos_embed.abs().sum() > 0
