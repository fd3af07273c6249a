"""Two processes and one run."""

import errno
import multiprocessing
import os
import signal
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import runs

from mambapeft_vision.results.layout import FAILURE_FILE
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.sweep.worker import Assignment, run
from mambapeft_vision.sweep.worker_cache import Kept
from mambapeft_vision.utils.atomic import atomic_path, remove_leftovers
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.lock import LOCK_FILE, InUseError, locked, one_at_a_time, remove_abandoned, sole_writer


def hold(folder, ready):
    with locked(folder):
        ready.send("locked")
        time.sleep(60)


@contextmanager
def held(folder):
    """A process that holds the folder's lock."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, theirs))
    process.start()
    assert ours.recv() == "locked"
    try:
        yield process
    finally:
        process.kill()
        process.join(10)


@pytest.fixture
def holder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with held(folder) as process:
        yield folder, process


def test_the_second_is_told_who_has_it(holder):
    folder, process = holder
    with (
        pytest.raises(InUseError, match=rf"is in use by process {process.pid} on \S+; wait for it or end it"),
        locked(folder),
    ):
        pytest.fail("two processes were let in")


def test_a_killed_holder_leaves_it_free(holder):
    folder, process = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    with locked(folder):
        assert (folder / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    with locked(folder):
        pass


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, error):
    def refused(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(FileLock, "acquire", refused)
    entered = []
    with locked(tmp_path):
        entered.append("folder")
    with one_at_a_time(tmp_path / "file"):
        entered.append("change")
    with sole_writer(tmp_path / "file") as path:
        path.write_text("x")
    assert entered == ["folder", "change"] and [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_lock_stays_and_no_longer_names_its_holder(tmp_path):
    with locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_bytes() == b""


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_what_is_planted_under_the_name_of_a_lock_is_refused_and_stays(tmp_path, kind):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    folder.mkdir()
    victim.write_text("precious")
    for name in (LOCK_FILE, ".file.part"):
        place = folder / name
        if kind == "hard link":
            os.link(victim, place)
        elif kind == "pipe":
            os.mkfifo(place)
        elif kind == "folder":
            place.mkdir()
        else:
            place.symlink_to(victim if kind == "link" else tmp_path / "made")
    for enter in (locked(folder), sole_writer(folder / "file"), one_at_a_time(folder / "file")):
        with pytest.raises(UserError, match="is a link or no plain file"), enter:
            pytest.fail("it was used")
    assert victim.read_text() == "precious" and not (tmp_path / "made").exists()


def as_nobody(folder, answer):
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        with locked(folder):
            answer.send("entered")
    except InUseError as error:
        answer.send(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT RUN: another user can be played by root alone")
@pytest.mark.parametrize("mode", [0o666, 0o644, 0o600])
def test_a_second_user_of_a_shared_folder_is_locked_out(mode):
    with tempfile.TemporaryDirectory() as name:  # below tmp_path nobody else may look
        folder = Path(name)
        folder.chmod(0o777)
        with held(folder) as process:
            if mode != 0o666:  # as older versions made it
                (folder / LOCK_FILE).chmod(mode)
            ours, theirs = multiprocessing.Pipe()
            other = multiprocessing.get_context("fork").Process(target=as_nobody, args=(folder, theirs))
            other.start()
            answer = ours.recv()
            other.join()
        holder = "another process" if mode == 0o600 else f"process {process.pid}"  # which nobody else may read
        assert f"is in use by {holder}" in answer


def test_who_deletes_the_lock_of_a_run_lets_nobody_in(tmp_path):
    """The folder itself is locked too."""
    with held(tmp_path):
        (tmp_path / LOCK_FILE).unlink()
        with pytest.raises(InUseError, match="is in use by another process"), locked(tmp_path):
            pytest.fail("two at once")
    with locked(tmp_path):
        pass


def test_names_of_temporary_files_cannot_be_foreseen(tmp_path):
    with atomic_path(tmp_path / "a") as one, atomic_path(tmp_path / "a") as two:
        assert one != two and str(os.getpid()) != one.name.split(".")[-2] and len(one.name.split(".")[-2]) == 16


def test_only_our_own_leftovers_are_deleted(tmp_path):
    ours, parts = f".a.{'0' * 16}.tmp", [".0a.npy.part"]
    others = [".vim.tmp", ".a.123.tmp", ".ubuntu.iso.part", "a.tmp"]
    for name in (ours, *parts, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / f".b.{'1' * 16}.tmp").symlink_to(tmp_path / "a.tmp")
    remove_leftovers(tmp_path)
    remove_abandoned(tmp_path, r"[0-9a-f]+\.npy")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, f".b.{'1' * 16}.tmp"])


def test_a_run_that_another_process_does_is_left_to_it(tmp_path, monkeypatch):
    """By the command and by a sweep's worker; nothing of the other process's folder changes."""
    task = runs.lay_out_task(tmp_path / "task")
    command = runs.overrides(task, tmp_path / "out")
    cfg = runs.compose_train(command)
    folder = make_plan(cfg).folder
    folder.mkdir(parents=True)
    with held(folder):
        for more in ((), ("resume=false",)):
            with pytest.raises(InUseError, match="is in use by process"):
                runs.run([*command, *more])
        outcome = run(Assignment(cfg, command, folder), Kept())
        assert outcome.record is None and "is in use by process" in outcome.error and not outcome.last
        assert outcome.elsewhere  # which is no failure
        assert [file.name for file in folder.iterdir()] == [LOCK_FILE] and not (folder / FAILURE_FILE).exists()
    assert runs.run(command).accuracy > 0
