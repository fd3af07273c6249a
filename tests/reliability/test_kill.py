"""SIGKILL at any moment: the same command goes on, to the same bits; no half file is read, nothing is done twice."""

import dataclasses
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import crashes, runs
from helpers.run_files import check_files, check_same

from mambapeft_vision.data import cache
from mambapeft_vision.results.layout import CHECKPOINT_FILE
from mambapeft_vision.results.record import RESULT_FILE
from mambapeft_vision.run.inputs import Inputs
from mambapeft_vision.run.run import train
from mambapeft_vision.sweep.jobs import State, plan_jobs, state_of
from mambapeft_vision.sweep.sweep import Command, sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="NOT RUN: needs Linux's process clocks"),
]

KILLS = 20


def train_and_kill(cfg, command, root, kill=None, cut=False):
    cache.SMALLEST = 0  # the images are small, and are cached all the same
    if kill is not None:
        crashes.kill_at(kill, root, cut)
    train(cfg, command)


def keep_moments(cfg, command, root, moments, answer):
    """Does the run, and keeps what a kill before each of its changes of files would leave.

    Changes before which the files are as before the last one are left out. Answers with the CPU time.
    """
    before = None

    def keep(number, event, path):
        nonlocal before
        state = [(str(file), file.stat().st_size) for file in sorted(root.rglob("*"))]
        half_written = path.endswith((".tmp", ".part")) and os.path.exists(path)
        if state != before or path.endswith(".part"):
            kept = moments / f"{number:03}-{'half' if half_written else 'whole'}"
            shutil.copytree(root, kept, symlinks=True)
            if half_written:
                crashes.cut_in_half(kept / Path(path).relative_to(root))
        before = state

    crashes.watch_changes(root, keep)
    train_and_kill(cfg, command, root)
    answer.send(time.process_time())


# What differs between any two runs: times, and the process that holds the folder.
MEASURED = (".lock", "metrics.csv", "train.log", RESULT_FILE, CHECKPOINT_FILE)


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Their content, if nothing in it is measured. Temporary files have random names."""
    return {
        re.sub("[0-9a-f]{16}", "", str(file.relative_to(folder))): None
        if any(name in file.name for name in MEASURED)
        else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


class Uninterrupted:
    """An uninterrupted run, and the command and the place that it was made with."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        moments = folder / "moments"
        moments.mkdir()
        task = runs.lay_out_task(folder / "task")
        more = ["trainer.max_epochs=2", f"paths.cache={self.root / 'cache'}"]
        self.command = runs.overrides(task, self.root / "out", *more)
        self.cfg = runs.compose_train(self.command)
        ours, theirs = multiprocessing.Pipe()
        process = crashes.start(keep_moments, self.cfg, self.command, self.root, moments, theirs)
        assert ours.poll(120), "the run did not end"
        self.seconds = ours.recv()  # of CPU time
        process.join()
        assert process.exitcode == 0
        self.moments = sorted(moments.iterdir())
        self.folder = runs.only_run_folder(self.root / "out").relative_to(self.root)
        self.kept = self.root.rename(folder / "whole")
        self.renew()

    def renew(self, moment: Path | None = None) -> None:
        """Nothing is there, or what a kill at that moment leaves."""
        shutil.rmtree(self.root, ignore_errors=True)
        if moment is None:
            self.root.mkdir()
        else:
            shutil.copytree(moment, self.root, symlinks=True)

    def go_on(self, *kill: object) -> int:
        return crashes.run_to_end(train_and_kill, self.cfg, self.command, self.root, *kill)

    def check_end(self) -> None:
        """The run that was killed has ended as the whole one did, to the last bit, and left nothing else."""
        check_same(self.root / self.folder, self.kept / self.folder)
        assert {f.name for f in (self.root / "cache").iterdir()} == {f.name for f in (self.kept / "cache").iterdir()}
        for file in (self.root / "cache").iterdir():
            assert file.read_bytes() == (self.kept / "cache" / file.name).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Uninterrupted:
    return Uninterrupted(tmp_path_factory.mktemp("kill"))


def test_killed_before_every_change_of_files(uninterrupted):
    """Also where half of a file is written: what is about to be renamed is cut in half."""
    halves = [moment for moment in uninterrupted.moments if moment.name.endswith("half")]
    assert len(uninterrupted.moments) > 25 and len(halves) >= 12
    for moment in uninterrupted.moments:
        uninterrupted.renew(moment)
        check_files(uninterrupted.root)
        assert uninterrupted.go_on() == 0, f"killed before change {moment.name}"
        uninterrupted.check_end()


def test_a_kill_leaves_what_was_kept_of_its_moment(uninterrupted):
    for moment in uninterrupted.moments[::6]:
        number, half = moment.name.split("-")
        uninterrupted.renew()
        assert uninterrupted.go_on(int(number), half == "half") == -signal.SIGKILL
        assert files_of(uninterrupted.root) == files_of(moment)


def test_killed_at_random_moments(uninterrupted):
    """A run is killed up to five times and goes on to its end; then comes the next one."""
    kills = 0
    moments = crashes.random_moments(seed=7, longest=uninterrupted.seconds)
    while kills < KILLS:
        uninterrupted.renew()
        for _ in range(5):
            kills += crashes.kill_after(
                crashes.start(train_and_kill, uninterrupted.cfg, uninterrupted.command, uninterrupted.root),
                next(moments),
            )
            check_files(uninterrupted.root)
        assert uninterrupted.go_on() == 0
        finished = (uninterrupted.root / uninterrupted.folder / RESULT_FILE).stat().st_mtime_ns
        assert uninterrupted.go_on() == 0  # once more changes nothing
        assert (uninterrupted.root / uninterrupted.folder / RESULT_FILE).stat().st_mtime_ns == finished
        uninterrupted.check_end()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, which is not here")
def test_a_process_on_a_gpu_killed_in_training(tmp_path):
    """On the CPU: tests/run/test_commands.py."""
    task = runs.lay_out_task(tmp_path / "task")
    outputs = tmp_path / "out"
    command = runs.overrides(task, outputs, "trainer.max_epochs=12", "trainer.device=cuda")
    runs.run(command)
    folder = runs.only_run_folder(outputs)
    kept = folder.rename(tmp_path / "whole")
    script = [sys.executable, str(runs.ROOT / "train.py"), *command]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("epoch 3/"):
                process.kill()
    assert process.returncode == -signal.SIGKILL and not (folder / RESULT_FILE).exists()
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "continues from" in done.stdout, done.stderr
    check_same(folder, kept)


# Sweeps


def do_sweep(jobs, workers):
    crashes.fork_workers()
    sys.exit(sweep(jobs, Command([], workers)))


def kill_some(process, generator: random.Random) -> int:
    """Kills the sweep, a worker of it or all, and waits for their end. Returns the number of kills, 1 or 0."""
    if not process.is_alive():
        return 0
    whom = generator.choice(["sweep", "worker", "all"])
    workers = children(process.pid)
    if whom == "worker" and workers:
        with suppress(ProcessLookupError):
            os.kill(workers[0], signal.SIGKILL)
    else:
        process.kill()
        for worker in workers if whom == "all" else []:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    process.join(60)
    assert process.exitcode is not None
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they end by themselves
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.01)
    return 1


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_a_sweep_killed_at_random_moments(tmp_path):
    """SIGKILL to the sweep, to one of its workers or to all of them."""
    outputs = tmp_path / "out"
    command = runs.overrides(runs.lay_out_task(tmp_path / "task"), outputs, "trainer.max_epochs=2", "seed=0,1,2")
    planned, inputs = plan_jobs(command, runs.CONFIGS), Inputs()
    generator = random.Random(3)
    assert crashes.run_to_end(time.monotonic) == 0  # from here on the fork server waits
    kills, whole_sweep, longest = 0, None, 0.0
    while whole_sweep is None or kills < KILLS:
        shutil.rmtree(outputs, ignore_errors=True)
        finished: dict[Path, int] = {}
        while True:
            jobs = [dataclasses.replace(job, state=state_of(job.plan, inputs)) for job in planned]
            assert {job.folder for job in jobs if job.state is State.FINISHED} == {f.parent for f in finished}
            if len(finished) == len(jobs) == 3:
                assert sweep(jobs, Command([], 2)) == 0  # repeats nothing, and removes what a late kill has left
                break
            begun, process = time.monotonic(), crashes.start(do_sweep, jobs, 2)
            if whole_sweep is None:  # the first one is left alone
                process.join(300)
                assert process.exitcode == 0
                longest = time.monotonic() - begun
            else:
                time.sleep(generator.uniform(0, longest))
                kills += kill_some(process, generator)
            check_files(outputs)
            now = {file: file.stat().st_mtime_ns for file in outputs.rglob(RESULT_FILE)}
            assert finished.items() <= now.items()  # no finished run is repeated
            finished = now
        assert not list(outputs.rglob("*.replaced-*")) and not list(outputs.rglob(CHECKPOINT_FILE))
        if whole_sweep is None:
            whole_sweep = outputs.rename(tmp_path / "whole")
        else:
            for file in finished:
                check_same(file.parent, whole_sweep / file.parent.relative_to(outputs))
