"""A worker process of a sweep: takes runs from the parent one by one, and answers how each one ended."""

import errno
import gc
import io
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from omegaconf import DictConfig

from mambapeft_vision.results.record import RunRecord, is_finished, read_record
from mambapeft_vision.run.exit import is_mistake, summary
from mambapeft_vision.run.failure_record import note_failure
from mambapeft_vision.run.run import train
from mambapeft_vision.sweep.worker_cache import Kept
from mambapeft_vision.utils.atomic import open_log
from mambapeft_vision.utils.errors import NotFiniteError, UserError
from mambapeft_vision.utils.lock import InUseError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.processes import end_with_parent
from mambapeft_vision.utils.progress import CANNOT_WRITE
from mambapeft_vision.utils.startup import begin_cuda
from mambapeft_vision.utils.timeline import begin, mark
from mambapeft_vision.utils.untrusted import refuse_links


@dataclass(frozen=True)
class Assignment:
    """A job for a worker. cfg: composed, not resolved; folder: the run's.

    outdated: `finished_at` of a record there that is to be replaced.
    """

    cfg: DictConfig
    overrides: list[str]
    folder: Path
    outdated: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with a record, or with an error in one line.

    last: the worker ends afterwards, because its process cannot be trusted after a crash.
    ends_sweep: why no other run may begin; empty where others may.
    elsewhere: another process, on this machine or another, works on the run; this is no failure.
    """

    record: RunRecord | None
    error: str = ""
    last: bool = False
    ends_sweep: str = ""
    elsewhere: bool = False


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is told when it starts.

    Args:
        environment: all variables of its environment; one of them chooses the GPU.
        threads: number of PyTorch's threads on the CPU.
        log: file for what runs print.
        tasks: number of tasks whose images are kept loaded.
        gpu: whether it has a GPU of its own.
    """

    environment: Mapping[str, str]
    threads: int
    log: Path
    tasks: int = 1
    gpu: bool = False


def work(connection: Connection, settings: WorkerSettings) -> None:
    """Main function of the process: works until it receives None, or until the parent has ended.

    It is started with SIGINT ignored: the parent handles Ctrl-C and ends the workers.

    Args:
        connection: gives an Assignment or None, takes an Outcome for each.
    """
    os.environ.clear()
    os.environ.update(settings.environment)
    if settings.gpu:
        begin_cuda("cuda")
    end_with_parent()
    print_to(settings.log)
    torch.set_num_threads(settings.threads)
    kept = Kept(settings.tasks)
    mark("imports")
    first = True
    while (assignment := connection.recv()) is not None:
        mark("assigned")
        outcome = run(assignment, kept)
        connection.send(outcome)
        begin()
        if outcome.last:
            return
        if first:  # everything is imported by now; freeze it, so that later collections skip it
            gc.collect()
            gc.freeze()
            first = False


def run(assignment: Assignment, kept: Kept) -> Outcome:
    """Executes one run; `train` writes an error to the run's folder."""
    try:
        record = _train(assignment, kept)
    except InUseError as error:
        return Outcome(None, summary(error), elsewhere=True)
    except Exception as error:
        traceback.print_exc()
        with suppress(UserError):  # through a link nothing is written
            refuse_links(assignment.folder, user_path(assignment.cfg.paths.outputs))
            note_failure(assignment.folder, error, assignment.overrides)
        return Outcome(None, summary(error), last=not is_mistake(error), ends_sweep=_ends_sweep(error))
    return Outcome(record)


def _ends_sweep(error: Exception) -> str:
    """Why no other run is to be begun after this error; empty where others are."""
    if isinstance(error, NotFiniteError) and error.ends_sweep:
        return "with trainer.on_nonfinite=skip_run, NaN or infinity in a run does not end it"
    system = error if isinstance(error, OSError) else error.__cause__
    if isinstance(system, OSError) and system.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return "every other run would write to the same disk"
    return ""


def _train(assignment: Assignment, kept: Kept) -> RunRecord:
    cfg, folder = assignment.cfg, assignment.folder
    if assignment.outdated is not None and is_finished(folder):
        # Otherwise another process has done it again since the sweep was planned.
        cfg.resume = read_record(folder).finished_at != assignment.outdated
    record = train(cfg, assignment.overrides, kept.sources)
    assert record is not None  # only a dry run has none
    return record


class _Forgiving(io.TextIOWrapper):
    """A stream for messages: a full disk loses lines but does not end the run."""

    def write(self, text: str) -> int:
        with suppress(*CANNOT_WRITE):
            super().write(text)
            self.flush()
        return len(text)

    def flush(self) -> None:
        with suppress(*CANNOT_WRITE):
            super().flush()


def print_to(log: Path) -> None:
    """Sends what this process prints, and what libraries below Python print, to a file."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_log(log)
    except (OSError, UserError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(*CANNOT_WRITE):
            stream.flush()
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (
        _Forgiving(open(number, "wb", closefd=False), "utf-8", "backslashreplace")  # noqa: SIM115
        for number in (1, 2)
    )
