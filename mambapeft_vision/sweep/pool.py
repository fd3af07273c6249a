"""The parent's side of a sweep's workers: starts them, shares the runs out, replaces those that die."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

import torch

from mambapeft_vision.results.record import RunRecord, is_finished, read_record
from mambapeft_vision.run.failure_record import write_failure
from mambapeft_vision.run.finish import remove_leftovers
from mambapeft_vision.sweep import fork_server
from mambapeft_vision.sweep.jobs import Job
from mambapeft_vision.sweep.worker import Assignment, Outcome, WorkerSettings, work
from mambapeft_vision.sweep.worker_cache import task_key
from mambapeft_vision.utils.errors import UserError

REFRESH_S = 0.5
PATIENCE_S = 10.0  # for a process to end by itself


class SweepError(UserError):
    """Raised when a failed run must also stop its sweep."""


class Watcher(Protocol):
    """Called at the events of a sweep."""

    def started(self, job: Job) -> None: ...

    def ended(self, job: Job, outcome: Outcome) -> None: ...

    def refresh(self) -> None:
        """Called at least every `REFRESH_S` seconds."""


class Queue:
    """Pending runs. Among the runs with the lowest turn, a worker is given one whose task it has already loaded,
    otherwise one whose task no other worker has loaded. Taking one costs the same however many are pending.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._by_turn: dict[int, dict[str, deque[Job]]] = {}
        self._size = len(jobs)
        for job in sorted(jobs, key=lambda job: job.turn):
            self._by_turn.setdefault(job.turn, {}).setdefault(task_key(job.plan), deque()).append(job)

    def __len__(self) -> int:
        return self._size

    def take(self, held: str | None, held_by_others: set[str]) -> Job:
        """Args: held, held_by_others: `task_key` of the tasks that are loaded."""
        turn, tasks = next(iter(self._by_turn.items()))
        free = (key for key in tasks if key not in held_by_others)
        key = held if held in tasks else next(free, next(iter(tasks)))
        job = tasks[key].popleft()
        if not tasks[key]:
            del tasks[key]
        if not tasks:
            del self._by_turn[turn]
        self._size -= 1
        return job

    def clear(self) -> None:
        self._by_turn, self._size = {}, 0


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Job | None = None
    held: str | None = None


class Pool:
    """Runs jobs in `size` worker processes, one run at a time each.

    Args:
        gpus: values of CUDA_VISIBLE_DEVICES, dealt out to workers in turn; empty: workers see what this process sees.
        logs: folder for what the workers print.
        tasks: number of tasks whose images a worker keeps loaded.
    """

    def __init__(self, size: int, gpus: Sequence[str], logs: Path, tasks: int = 1) -> None:
        self.size = size
        self._tasks = tasks
        self._gpus = gpus
        self._logs = logs
        self._workers: dict[int, _Worker] = {}

    def run(self, jobs: Sequence[Job], watcher: Watcher, enough: Callable[[], bool] = lambda: False) -> None:
        """Runs all jobs and returns when each has ended, well or not. Ends all workers when it is interrupted.

        Args:
            enough: once it says so, no further job begins, and it returns when those under way have ended.
        Raises: SweepError after a run with which the sweep is to end.
        """
        queue = Queue(jobs)
        with self._ended_at_exit():
            while queue or any(worker.job for worker in self._workers.values()):
                if queue and enough():
                    queue.clear()
                for number in range(self.size):
                    if queue and self._idle(number):
                        self._assign(number, queue, watcher)
                self._wait()
                for number, worker in list(self._workers.items()):
                    if worker.job is not None:
                        self._collect(number, worker, watcher)
                watcher.refresh()

    def settings_of(self, number: int) -> WorkerSettings:
        """The settings of a worker. Every GPU gets a worker before one gets a second."""
        environment = dict(os.environ)  # the fork server's is as old as it is
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        return WorkerSettings(
            environment=environment,
            threads=max(1, torch.get_num_threads() // self.size),
            log=self._logs / f"worker{number}.log",
            tasks=self._tasks,
            gpu=bool(self._gpus),
        )

    def _idle(self, number: int) -> bool:
        return number not in self._workers or self._workers[number].job is None

    def _assign(self, number: int, queue: Queue, watcher: Watcher) -> None:
        worker = self._workers.get(number)
        if worker is None:
            worker = self._workers[number] = self._start(number)
        job = queue.take(worker.held, {w.held for w in self._workers.values() if w is not worker and w.held})
        worker.job, worker.held = job, task_key(job.plan)
        watcher.started(job)
        with suppress(OSError):  # it has died; _collect finds that out
            worker.connection.send(assignment_of(job))

    def _start(self, number: int) -> _Worker:
        ours, theirs = fork_server.context.Pipe()
        arguments = theirs, self.settings_of(number)
        process = fork_server.context.Process(target=work, args=arguments, name=f"sweep worker {number}")
        fork_server.start()
        with fork_server.interrupts_ignored():  # the process inherits this
            process.start()
        theirs.close()  # else its end would not be noticed
        return _Worker(process, ours)

    def _wait(self) -> None:
        busy = [worker for worker in self._workers.values() if worker.job is not None]
        wait([w.connection for w in busy] + [w.process.sentinel for w in busy], timeout=REFRESH_S)

    def _collect(self, number: int, worker: _Worker, watcher: Watcher) -> None:
        """Takes the outcome of a run that has ended. If its worker died, the outcome is a failure."""
        job = worker.job
        assert job is not None  # only workers that are at one are asked
        try:
            dead = not worker.process.is_alive()  # asked first: its last words may come until then
            if not dead and not worker.connection.poll():
                return
            outcome = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(PATIENCE_S)
            outcome = _outcome_of_dead(job, worker.process.exitcode)
        worker.job = None
        if outcome.last:
            worker.process.join(PATIENCE_S)
            worker.process.kill()
            del self._workers[number]
        watcher.ended(job, outcome)
        if outcome.ends_sweep:
            raise SweepError(
                f"{job.label}: {outcome.error}\n"
                f"The sweep ends with it: {outcome.ends_sweep}. The same command continues"
            )

    @contextmanager
    def _ended_at_exit(self) -> Iterator[None]:
        try:
            yield
            for worker in self._workers.values():
                with suppress(OSError):
                    worker.connection.send(None)
        except BaseException:
            for worker in self._workers.values():
                worker.process.terminate()
            raise
        finally:
            deadline = time.monotonic() + PATIENCE_S
            for worker in self._workers.values():
                worker.process.join(max(0.0, deadline - time.monotonic()))
                worker.process.kill()


def visible_gpus() -> list[str]:
    """One value of CUDA_VISIBLE_DEVICES for each GPU that this process sees."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else list(map(str, range(torch.cuda.device_count())))
    return names[: torch.cuda.device_count()]


def assignment_of(job: Job) -> Assignment:
    """The job in the form that workers receive."""
    cfg = job.config()
    cfg.resume = True
    return Assignment(cfg, job.overrides, job.folder, job.outdated)


def _outcome_of_dead(job: Job, code: int | None) -> Outcome:
    """The outcome of the run of a worker that died: its result if that was written before, else a failure."""
    record = _result_of(job)
    if record is not None:
        remove_leftovers(job.folder)
        return Outcome(record, last=True)
    error = _death(code)
    write_failure(job.folder, error, "WorkerDied", "", job.overrides)
    return Outcome(None, error, last=True)


def _result_of(job: Job) -> RunRecord | None:
    """A result that has appeared since the sweep was planned; None if there is none."""
    with suppress(UserError):
        if is_finished(job.folder):
            record = read_record(job.folder)
            return record if record.finished_at != job.outdated else None
    return None


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        hint = "; out of memory?" if code == -9 else ""
        return f"the worker process was ended by signal {-code}{hint}"
    return f"the worker process ended with exit code {code}"
