"""Several processes at the same run, the same cache, the same results: one wins, nothing is corrupted."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import crashes, runs
from helpers.fake_records import fake_record

from mambapeft_vision.data import Preprocessing, cache, manifest
from mambapeft_vision.data.generated import mini
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.images import decode_list
from mambapeft_vision.results.record import RESULT_FILE, read_record, write_record
from mambapeft_vision.results.tables import find_records
from mambapeft_vision.run.run import train
from mambapeft_vision.run.run_config import make_plan, set_aside
from mambapeft_vision.utils.lock import InUseError, remove_abandoned

PREPROCESSING = Preprocessing((6, 5), "bicubic", (0.5,) * 3, (0.5,) * 3)
PROCESSES = 4


def together(function, *arguments):
    """The exit codes of processes that call `function(start, *arguments)`, where `start()` returns in all at once."""
    events = [multiprocessing.Pipe() for _ in range(PROCESSES)]
    processes = [crashes.start(function, theirs, *arguments) for _, theirs in events]
    for ours, _ in events:
        assert ours.poll(60) and ours.recv() == "ready"
    for ours, _ in events:
        ours.send("go")
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def wait_for_others(connection):
    connection.send("ready")
    connection.recv()


# The same run

WON, LEFT_TO_IT = 0, 9


def train_with_others(connection, cfg, command):
    wait_for_others(connection)
    try:
        train(cfg, command)
    except InUseError:
        os._exit(LEFT_TO_IT)


@pytest.mark.parametrize("resume", ["true", "false"])
def test_the_same_run_is_done_by_one(task, tmp_path, resume):
    command = runs.overrides(task, tmp_path, "trainer.max_epochs=4", f"resume={resume}")
    cfg = runs.compose_train(command)
    codes = together(train_with_others, cfg, command)
    assert WON in codes and set(codes) <= {WON, LEFT_TO_IT}
    folder = make_plan(cfg).folder
    record = read_record(folder)
    if resume == "true":
        assert (folder / "train.log").read_text().count("\nepoch 1/4") == 1
    alone = runs.run(runs.overrides(task, tmp_path / "alone", "trainer.max_epochs=4"))
    assert (record.accuracy, record.loss) == (alone.accuracy, alone.loss)
    tensors = runs.read_adapter_tensors(folder)
    expected = runs.read_adapter_tensors(runs.only_run_folder(tmp_path / "alone"))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


# The same cache


def fill(connection, task, folder, log, hold=0.0):
    """Caches a split and notes in `log` what is decoded; `hold` seconds in the middle of it."""
    cache.SMALLEST = 0
    decode = cache.decode_into

    def noted(images, *arguments, **options):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        images[0] = 255  # something, and not what it will be
        time.sleep(hold)
        decode(images, *arguments, **options)

    cache.decode_into = noted
    listing = read_list(task / "train800val200.txt", runs.CLASSES, remedy="")
    wait_for_others(connection)
    found = cache.cached_list(listing, PREPROCESSING, folder)
    assert torch.equal(found.images, decode_list(listing, PREPROCESSING).images)


def test_the_same_cache_is_filled_by_one(task, tmp_path):
    assert together(fill, task, tmp_path / "cache", tmp_path / "log", 0.3) == [0] * PROCESSES
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_one_takes_over_where_the_filling_one_is_killed(task, tmp_path):
    log = tmp_path / "log"
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    arguments = (task, tmp_path / "cache", log)
    filling = crashes.start(fill, pipes[0][1], *arguments, 300.0)
    pipes[0][0].send("go")
    deadline = time.monotonic() + 60
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    waiting = crashes.start(fill, pipes[1][1], *arguments)
    pipes[1][0].send("go")
    assert pipes[1][0].poll(60)
    time.sleep(0.3)
    assert waiting.is_alive() and len(log.read_text().splitlines()) == 1
    (part,) = (tmp_path / "cache").iterdir()
    remove_abandoned(tmp_path / "cache", ".*")
    assert part.exists()  # it is held
    os.kill(filling.pid, signal.SIGKILL)
    filling.join()
    waiting.join(60)
    assert waiting.exitcode == 0 and len(log.read_text().splitlines()) == 2
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npy"]


def test_what_killed_processes_left_in_the_cache_is_cleared_away(tmp_path):
    (tmp_path / ".0123.images.npy.part").write_bytes(b"half")
    cache.clean(tmp_path, 1 << 30)
    assert not list(tmp_path.iterdir())


# The same task


def lay_out(connection, folder, log):
    """Lays a small generated task out and notes in `log` that it is drawn, which takes a while."""
    task = mini.Task("sprites_loc", "structured", 16, 4, num_train=5, num_val=2, family="mini")
    draw = mini.draw_splits

    def noted(task):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return draw(task)

    mini.draw_splits = noted
    wait_for_others(connection)
    mini.lay_out_generated(task, folder)
    assert manifest.read_entry(folder.parent, folder.name) is not None


def test_the_same_task_is_drawn_by_one(tmp_path):
    assert together(lay_out, tmp_path / "data" / "sprites_loc", tmp_path / "log") == [0] * PROCESSES
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    files = {manifest.MANIFEST_FILE, "sprites_loc", ".sprites_loc.verified.json"}
    assert {path.name for path in (tmp_path / "data").iterdir()} == files


def note_tasks(connection, root):
    wait_for_others(connection)
    for task in range(20):
        manifest.write_entry(root, f"{os.getpid()}-{task}", manifest.TaskEntry("0" * 64, {}, task, 0, {}, True))


def test_of_tasks_noted_at_once_none_is_lost(tmp_path):
    assert together(note_tasks, tmp_path) == [0] * PROCESSES
    noted = json.loads((tmp_path / manifest.MANIFEST_FILE).read_text())["tasks"]
    assert len(noted) == 20 * PROCESSES
    assert {path.name for path in tmp_path.iterdir()} == {
        manifest.MANIFEST_FILE,
        *(f".{name}.verified.json" for name in noted),
    }


# Results

RUNS = 6


def write_results(connection, outputs):
    """Finishes runs, sets them aside and finishes them again, until it is killed."""
    wait_for_others(connection)
    while True:
        for seed in range(RUNS):
            folder = outputs / "custom" / "one" / "a" / f"seed{seed}"
            set_aside(folder)
            folder.mkdir(parents=True)
            record = fake_record("custom/one", "a", seed, 0.5)
            write_record(folder, replace(record, config={**record.config, "filler": "x" * 100_000}))


def test_results_are_collected_while_a_sweep_writes(tmp_path):
    outputs = Path(tmp_path)
    ours, theirs = multiprocessing.Pipe()
    writer = crashes.start(write_results, theirs, outputs)
    ours.send("go")
    try:
        seen, changes = set(), set()
        deadline = time.monotonic() + 60
        while len(changes) < 12:
            assert writer.is_alive() and time.monotonic() < deadline
            records = find_records([outputs])
            seen |= {record.seed for record in records}
            changes.add(tuple(sorted(str(file) for file in outputs.glob(f"*/*/*/*/{RESULT_FILE}"))))
            assert all(len(record.config["filler"]) == 100_000 for record in records)
    finally:
        writer.kill()
        writer.join()
    assert seen == set(range(RUNS))
