"""Processes of tests that are killed: forked from one that has everything imported, so that each costs a fork.

It has also composed a config and trained a step: what is imported, compiled or read for the first time then (Hydra's
parser, Numba and its compiled loops) takes four times as long as a tiny run that finds it all there.

`start` runs a function of a test module (or of this one) in such a process. `kill_at` lets the process kill itself
before its n-th change of files, whichever code makes it: Python's audit events tell of all of them.
"""

import gc
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest  # noqa: F401 (imported for the children)
import torch
from helpers import runs
from helpers.quick import skip_what_costs_time

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.engine import distributed
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.sweep import fork_server, pool, sweep  # noqa: F401 (imported for the children)
from mambapeft_vision.utils.environment import git_state, library_versions

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*fork_server.PRELOAD, "helpers.crashes"])


def _warm_up() -> None:
    """What every child would do first, in one thread: a child would wait for others, which are not forked with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    skip_what_costs_time()
    git_state(), library_versions()
    runs.compose_train(runs.SMALL_BACKBONE)
    backbone = create_backbone("vim_pico_patch8_32", "random", depth=1, embed_dim=32)
    model = adapt(backbone, {"lora_p_x": LoRA(targets="in_proj", rank=4, rows="x")}, runs.CLASSES)
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    torch.set_num_threads(threads)


_warm_up()
gc.freeze()  # in the fork server: collections in its children need not look at what was imported


@contextmanager
def _importable() -> Iterator[None]:
    """The fork server finds the tests' modules; of its parent's sys.path it takes nothing."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    process = _CONTEXT.Process(target=_in_child, args=(function, *arguments))
    with _importable():
        process.start()
    return process


def run_to_end(function: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> int:
    """The exit code of a process that calls the function; negative: the signal that ended it."""
    process = start(function, *arguments)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{function.__name__} did not end in {seconds} s")
    return process.exitcode


def _in_child(function: Callable[..., Any], *arguments: Any) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # errors are told
    function(*arguments)


@dataclass(frozen=True)
class Command:
    """A command of the project, as a process that has begun in a folder."""

    process: BaseProcess
    outputs: tuple[Path, Path]  # files with what it prints, and its errors

    def end(self, seconds: float = 300.0) -> tuple[int, str, str]:
        """Waits for it: exit code (negative: the signal that ended it), output, errors."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"{self.process.name} did not end in {seconds} s")
        return self.process.exitcode, *(file.read_text() for file in self.outputs)


@cache
def _said() -> tempfile.TemporaryDirectory[str]:
    """Goes when this process ends."""
    return tempfile.TemporaryDirectory()


def begin(folder: Path, script: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Command:
    said = Path(tempfile.mkdtemp(dir=_said().name))
    outputs = said / "out", said / "err"
    return Command(start(_command, folder, str(runs.ROOT / script), arguments, environment, outputs), outputs)


def command(
    folder: Path, script: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """A command of the project, as a process in `folder`: exit code, output, errors."""
    return begin(folder, script, *arguments, environment=environment).end()


def _command(
    folder: Path,
    script: str,
    arguments: tuple[str, ...],
    environment: Mapping[str, str] | None,
    outputs: tuple[Path, Path],
) -> None:
    os.setsid()  # as a shell does: Ctrl-C goes to a command and its workers, and not to the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    for descriptor, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = [script, *arguments]
    fork_workers()
    runpy.run_path(script, run_name="__main__")


def fork_workers() -> None:
    """Lets the workers of sweeps in this process start as quickly as it did."""
    fork_server.context = multiprocessing.get_context("fork")


def fork_ranks() -> None:
    """The same for the other ranks of a run on the CPU."""
    distributed.multiprocessing = _Forking()


class _Forking:
    """The module multiprocessing, but that new processes are forked."""

    def get_context(self, _: str) -> multiprocessing.context.BaseContext:
        return multiprocessing.get_context("fork")

    def __getattr__(self, name: str) -> object:
        return getattr(multiprocessing, name)


# Moments


def kill_after(process: BaseProcess, seconds: float) -> bool:
    """SIGKILL to the process once it has used so much CPU time; False where it ended before."""
    clock = (~process.pid << 3) | 2  # Linux: the CPU clock of a process
    while process.is_alive():
        try:
            used = time.clock_gettime(clock)
        except OSError:
            break
        if used >= seconds:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return process.exitcode == -signal.SIGKILL
        time.sleep(0.002)
    process.join()
    assert process.exitcode == 0, f"it ended by itself with {process.exitcode}"
    return False


def random_moments(seed: int, longest: float) -> Iterator[float]:
    """Seconds from 0 to `longest`, the same for the same seed."""
    generator = random.Random(seed)
    while True:
        yield generator.uniform(0, longest)


# Changes of files

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _changes(event: str, arguments: tuple, root: str) -> str | None:
    """The path below root that an audit event is about to change."""
    if event == "open":
        path, _, flags = arguments
        if not flags & _WRITES:
            return None
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        path = arguments[0]
    else:
        return None
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    return path if path.startswith(root) else None


def watch_changes(root: Path, act: Callable[[int, str, str], None]) -> None:
    """Calls `act(number, event, path)` before each change of files below root, for the rest of this process."""
    count, busy = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count, busy
        if busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        path = _changes(event, arguments, str(root))
        if path is None or (event == "os.remove" and not os.path.exists(path)):
            return
        count, busy = count + 1, True
        try:
            act(count, event, path)
        finally:
            busy = False

    sys.addaudithook(hook)


def cut_in_half(path: str | Path) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def kill_at(number: int, root: Path, cut: bool = False) -> None:
    """SIGKILL to this process before its change of files with this number (from 1) below root.

    cut: a file that is about to be renamed or reopened, which is a whole one, loses its second half first: the kill
    might as well have come while it was written.
    """

    def act(count: int, event: str, path: str) -> None:
        if count == number:
            if cut and os.path.isfile(path):
                cut_in_half(path)
            os.kill(os.getpid(), signal.SIGKILL)

    watch_changes(root, act)


def fail_from(number: int, root: Path, error: int) -> None:
    """From its change of files with this number on, this process can write nothing below root: `error` is an errno."""

    def act(count: int, event: str, path: str) -> None:
        if count >= number and event in ("open", "os.mkdir"):
            raise OSError(error, os.strerror(error), path)

    watch_changes(root, act)
