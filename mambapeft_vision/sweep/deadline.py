"""Many short runs in a limited time: brief lines instead of a table, and an end that keeps what is done."""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.sweep.jobs import Job, State
from mambapeft_vision.sweep.pool import Pool
from mambapeft_vision.sweep.sweep import LOGS, ended_by_sigterm, gpus_of
from mambapeft_vision.sweep.worker import Outcome
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.progress import format_duration
from mambapeft_vision.utils.untrusted import refuse_links

LINE_EVERY_S = 15.0
RECENT = 100  # runs, by whose longest the last ones are judged
RETRY_S = 5.0  # until runs that other processes were at are looked for again


class TimeUp(Exception):  # noqa: N818 (no error)
    """The limit is reached while runs are under way."""


class Follower:
    """Follows a sweep and its clock; a `Watcher` of the pool.

    Args:
        jobs: how many there are to run.
        deadline: on the monotonic clock, seconds.
    """

    def __init__(self, jobs: int, deadline: float = float("inf")) -> None:
        self._jobs = jobs
        self._deadline = deadline
        self.begun: dict[str, float] = {}
        self.took: deque[float] = deque(maxlen=RECENT)
        self._started = time.monotonic()
        self._next_line = self._started + LINE_EVERY_S
        self.records: list[RunRecord] = []
        self.failures: list[tuple[Job, str]] = []
        self.elsewhere: list[Job] = []  # other processes are at them

    def started(self, job: Job) -> None:
        self.begun[str(job.folder)] = time.monotonic()

    def ended(self, job: Job, outcome: Outcome) -> None:
        seconds = time.monotonic() - self.begun.pop(str(job.folder))
        if outcome.elsewhere:
            self.elsewhere.append(job)
            return
        self.took.append(seconds)
        if outcome.record is None:
            self.failures.append((job, outcome.error))
            say(f"FAILED  {job.label}: {outcome.error}")
        else:
            self.records.append(outcome.record)

    def refresh(self) -> None:
        """Raises: TimeUp."""
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LINE_EVERY_S
            say(self.state())
        if now >= self._deadline:
            raise TimeUp

    def wait_for_others(self) -> list[Job]:
        """The runs that other processes were at, to try again; after a pause where there are some. Raises: TimeUp."""
        until = time.monotonic() + (RETRY_S if self.elsewhere else 0)
        while time.monotonic() < until:
            time.sleep(min(1.0, RETRY_S))
            self.refresh()
        jobs, self.elsewhere = self.elsewhere, []
        return jobs

    def enough(self) -> bool:
        """Whether a run that began now would probably not end in time."""
        return time.monotonic() + max(self.took, default=0.0) > self._deadline

    def state(self) -> str:
        done, seconds = len(self.records), time.monotonic() - self._started
        left = self._jobs - done - len(self.failures)
        text = f"{done} of {self._jobs} done in {format_duration(seconds)}, {len(self.failures)} failed"
        if self.elsewhere:
            text += f", {len(self.elsewhere)} with other processes"
        if done and left:
            each = seconds / done
            text += f"; {1 / each:.2f} runs/s, {format_duration(left * each)} for the {left} left"
        return text


def run_in_time(jobs: Sequence[Job], workers: int, *, deadline: float = float("inf"), tasks: int = 1) -> Follower:
    """Runs all unfinished jobs, `workers` at a time, until the deadline.

    Several processes may share the jobs: each waits for the runs that another one is at, and does them if that one
    ends before.

    Args:
        deadline: on the monotonic clock, seconds. No run begins that would probably end later; runs that are still
            under way at the deadline get the signal to save and end.
        tasks: number of tasks whose images a worker keeps loaded.
    Raises: KeyboardInterrupt after ending the workers.
    """
    todo = [job for job in jobs if job.state is not State.FINISHED]
    follower = Follower(len(todo), deadline)
    if not todo:
        return follower
    outputs = Path(todo[0].plan.config["paths"]["outputs"]).expanduser()
    refuse_links(outputs / LOGS, outputs)
    with ended_by_sigterm(), suppress(TimeUp):
        while todo:
            Pool(workers, gpus_of(todo), outputs / LOGS, tasks).run(todo, follower, follower.enough)
            todo = follower.wait_for_others()
    return follower
