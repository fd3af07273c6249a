"""A disk that is full, read-only or in the way: said at once, nothing that was written is damaged, and it goes on."""

import errno
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import crashes, runs
from helpers.run_files import check_files, check_same

from mambapeft_vision.data import cache
from mambapeft_vision.results.layout import CHECKPOINT_FILE
from mambapeft_vision.results.record import RESULT_FILE
from mambapeft_vision.run.exit import CRASH, USER_MISTAKE, describe_error, is_mistake
from mambapeft_vision.run.run import train
from mambapeft_vision.utils.errors import DiskError

MORE = ["trainer.max_epochs=3"]
FAILURES = 6


def train_on_a_full_disk(cfg, command, message, root, number, error):
    """Leaves with the exit code of train.py and writes what it would print."""
    if number is not None:
        crashes.fail_from(number, root, error)
    try:
        train(cfg, command)
    except Exception as failure:
        message.write_text(describe_error(failure))
        sys.exit(USER_MISTAKE if is_mistake(failure) else CRASH)


def attempt(command, message, root=None, number=None, error=None):
    message.write_text("")
    code = crashes.run_to_end(train_on_a_full_disk, runs.compose_train(command), command, message, root, number, error)
    return code, message.read_text()


def same_but_for_places(one, other):
    """As `check_same` of two runs that were made in different folders."""
    for name in ("config.yaml", "overrides.yaml"):
        shutil.copy(other / name, one / name)
    text = (one / RESULT_FILE).read_text()
    outputs = one.parents[3], other.parents[3]
    (one / RESULT_FILE).write_text(text.replace(str(outputs[0]), str(outputs[1])))
    check_same(one, other)


def test_full_from_any_write_on(task, whole, tmp_path):
    """At seeded writes of the run, the first and the last ones among them; then there is space again."""
    outputs, message = tmp_path / "out", tmp_path / "message"
    command = runs.overrides(task, outputs, *MORE)
    chosen = sorted({1, 4, *random.Random(0).sample(range(5, 46), FAILURES - 2)})
    kept = 0
    for number in chosen:
        shutil.rmtree(outputs, ignore_errors=True)
        code, text = attempt(command, message, outputs, number, errno.ENOSPC)
        assert code == USER_MISTAKE, (number, text)
        assert f"{outputs}" in text and "No space left on device; free some space, or choose another disk" in text
        assert "the same command continues" in text and "Traceback" not in text
        check_files(outputs)
        kept += any(outputs.rglob(CHECKPOINT_FILE))
        assert attempt(command, message)[0] == 0
        same_but_for_places(runs.only_run_folder(outputs), whole)
    assert kept >= 2


@contextmanager
def small_disk(folder: Path, size: str = "400k"):
    """A real one. Mounting takes rights that not every machine gives."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"NOT RUN: no disk can be mounted here ({mounted.stderr.decode().strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_disk_that_is_full(task, whole, tmp_path):
    """Filled up to less and less, so that it is full at other files, and in the middle of them."""
    message = tmp_path / "message"
    with small_disk(tmp_path / "disk") as disk:
        command = runs.overrides(task, disk / "out", *MORE)
        ballast, failed, kept = disk / "ballast", 0, 0
        for left in range(0, 96, 12):
            shutil.rmtree(disk / "out", ignore_errors=True)
            ballast.write_bytes(b"x" * (shutil.disk_usage(disk).free - left * 1024))
            code, text = attempt(command, message)
            check_files(disk)
            ballast.unlink()
            if code == 0:
                break
            assert code == USER_MISTAKE and "No space left on device" in text and "Traceback" not in text
            failed, kept = failed + 1, kept + any(disk.rglob(CHECKPOINT_FILE))
            assert attempt(command, message)[0] == 0
            same_but_for_places(runs.only_run_folder(disk / "out"), whole)
        assert code == 0 and failed >= 3 and kept >= 1


def test_a_real_read_only_disk(task, tmp_path):
    """A new run and a new sweep are refused at once; a finished run is found."""
    message = tmp_path / "message"
    with small_disk(tmp_path / "disk") as disk:
        finished = runs.overrides(task, disk / "out", "trainer.max_epochs=1")
        assert attempt(finished, message)[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert attempt(finished, message)[0] == 0
        code, text = attempt(runs.overrides(task, disk / "out", *MORE), message)
        assert code == USER_MISTAKE and "Read-only file system; make it writable, or choose another folder" in text
        assert "paths.outputs=DIR" in text
        code, _, err = crashes.command(
            tmp_path, "scripts/sweep_vtab1k.py", *runs.overrides(task, disk / "new", *MORE, "seed=0,1")
        )
        assert code == USER_MISTAKE and "Read-only file system" in err and "Nothing was begun" in err
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_other_reasons_in_the_middle_of_a_run(task, tmp_path, error):
    outputs, message = tmp_path / "out", tmp_path / "message"
    code, text = attempt(runs.overrides(task, outputs, *MORE), message, outputs, 30, error)
    assert code == USER_MISTAKE and os.strerror(error) in text and "paths.outputs=DIR" in text
    check_files(outputs)


def test_a_file_where_the_outputs_should_be(task, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DiskError, match="out.*: Not a directory; a file stands where a folder is expected"):
        runs.run(runs.overrides(task, tmp_path / "out"))


def test_what_other_commands_say_of_a_disk():
    """A line for what the user can repair; a traceback for a file that the program should have known of."""
    refused = PermissionError(errno.EACCES, "Permission denied", "results/report.html")
    assert is_mistake(refused) and describe_error(refused) == (
        "error: results/report.html: Permission denied; make it accessible, or choose another folder"
    )
    assert not is_mistake(FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))


# The cache


def cached_run(cfg, command, limit):
    cache.SMALLEST = 0
    if limit is not None:
        crashes.fail_from(1, limit, errno.EROFS)
    train(cfg, command)


def test_a_cache_that_cannot_be_written_is_done_without(task, whole, tmp_path):
    """With a warning before anything is decoded (tests/data/test_cache.py); the run is the same."""
    folder = tmp_path / "cache"
    command = runs.overrides(task, tmp_path / "out", *MORE, f"paths.cache={folder}")
    assert crashes.run_to_end(cached_run, runs.compose_train(command), command, folder) == 0
    assert not folder.exists()
    adapters = [f / "adapter.safetensors" for f in (runs.only_run_folder(tmp_path / "out"), whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def fill(task, folder, message):
    from mambapeft_vision.data import Preprocessing
    from mambapeft_vision.data.image_list import read_list

    cache.SMALLEST = cache.SPARE = 0
    cache.obstacle_to_caching = lambda *_: None  # the space is taken by another process after this one has looked
    listing = read_list(task / "train800val200.txt", runs.CLASSES, remedy="")
    with pytest.warns(UserWarning) as caught:
        found = cache.cached_list(listing, Preprocessing((160, 160), "bicubic", (0.5,) * 3, (0.5,) * 3), folder)
    message.write_text(str(caught[0].message))
    assert len(found) == runs.TRAIN_IMAGES


def test_a_real_disk_that_fills_up_while_decoding_is_no_sudden_end(task, tmp_path):
    """A mapped file on a full disk would end the process with SIGBUS."""
    message = tmp_path / "message"
    with small_disk(tmp_path / "disk") as disk:
        assert crashes.run_to_end(fill, task, disk, message) == 0
        assert "No space left on device; set paths.cache to another disk or to null" in message.read_text()
        assert not list(disk.iterdir())
