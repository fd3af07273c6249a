"""The output of a sweep: a live table on a terminal; elsewhere, a line for each run that begins or ends."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.sweep.estimates import Speeds
from mambapeft_vision.sweep.jobs import Job
from mambapeft_vision.sweep.worker import Outcome
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.progress import CANNOT_WRITE, format_duration

FAILURES_SHOWN = 5
LINE_EVERY_S = 60.0
ESTIMATING_SHARE = 0.02  # share of the time that estimating may take


class Display:
    """Follows a sweep; a `Watcher` of the pool.

    Args:
        jobs: the runs of the sweep that are not finished.
        finished: how many were finished before.
        speeds: from which the time left is estimated; runs that end are added.
        workers: runs at a time.
    """

    def __init__(self, jobs: Sequence[Job], finished: int, speeds: Speeds, workers: int) -> None:
        self._waiting = {job.folder: job for job in jobs}
        self._waiting_seconds: float | None = None  # estimate for all that wait
        self._estimate_again_at = 0.0
        self._finished_before = finished
        self._speeds = speeds
        self._workers = workers
        self._running: dict[str, tuple[Job, float]] = {}  # by folder, with the time of the start
        self._done = 0
        self.elsewhere = 0  # runs that other processes are at
        self.failures: list[tuple[Job, str]] = []
        self._next_line = time.monotonic() + LINE_EVERY_S
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False) if sys.stdout.isatty() else None

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with suppress(*CANNOT_WRITE):
                self._live.update(self.table(), refresh=True)
                self._live.stop()

    def started(self, job: Job) -> None:
        del self._waiting[job.folder]
        seconds = self._speeds.seconds(job.plan)
        if self._waiting_seconds is not None and seconds is not None:
            self._waiting_seconds = max(0.0, self._waiting_seconds - seconds)
        self._running[str(job.folder)] = job, time.monotonic()
        self._say(f"begins  {job.label}")

    def ended(self, job: Job, outcome: Outcome) -> None:
        _, since = self._running.pop(str(job.folder))
        took = format_duration(time.monotonic() - since)
        if outcome.elsewhere:
            self.elsewhere += 1
            self._say(f"skipped {job.label}: {outcome.error}")
        elif outcome.record is None:
            self.failures.append((job, outcome.error))
            self._say(f"FAILED  {job.label} after {took}: {outcome.error}")
        else:
            self._done += 1
            self._speeds.add(outcome.record)
            self._say(f"done    {job.label} in {took}: {outcome.record.accuracy:.2%}   ({self.state()})")

    def refresh(self) -> None:
        if self._live is not None:
            with suppress(*CANNOT_WRITE):
                self._live.update(self.table(), refresh=True)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            self._say(f"        {self.state()}")

    def state(self) -> str:
        """All counts, the speed and the time left in one line."""
        before = f" (and {self._finished_before} before)" if self._finished_before else ""
        counts = (
            f"{self._done} done{before}, {len(self._running)} running, {len(self._waiting)} waiting, "
            f"{len(self.failures)} failed"
        )
        if self.elsewhere:
            counts += f", {self.elsewhere} left to other processes"
        if not (self._running or self._waiting):
            return counts
        rate = sum(_progress(job)[1] for job, _ in self._running.values())
        return f"{counts}, {rate:,.0f} images/s, {self._time_left()}" if rate else f"{counts}, {self._time_left()}"

    def _time_left(self) -> str:
        seconds = self._estimate_of_waiting()
        for job, since in self._running.values():
            estimate = self._speeds.seconds(job.plan)
            seconds = None if seconds is None or estimate is None else seconds + max(0.0, estimate - _age(since))
        return "time left unknown" if seconds is None else f"about {format_duration(seconds / self._workers)} left"

    def _estimate_of_waiting(self) -> float | None:
        """Seconds of all waiting runs, computed now and then only, because thousands may wait."""
        begun = time.monotonic()
        if begun >= self._estimate_again_at:
            self._waiting_seconds = self._speeds.total(job.plan for job in self._waiting.values())
            took = time.monotonic() - begun
            self._estimate_again_at = begun + took / ESTIMATING_SHARE
        return self._waiting_seconds

    def _say(self, text: str) -> None:
        if self._live is None:
            say(text)

    def table(self) -> Group:
        """The live table."""
        table = Table("run", "epoch", "images/s", "for", box=None, header_style="bold")
        for job, since in self._running.values():
            epoch, rate = _progress(job)
            epochs = f"{epoch}/{job.plan.recipe.max_epochs}"
            table.add_row(job.label, epochs, f"{rate:,.0f}" if rate else "", format_duration(_age(since)))
        failures = [
            Text(f"failed: {job.label}: {error}", style="red") for job, error in self.failures[-FAILURES_SHOWN:]
        ]
        return Group(Text(self.state(), style="bold"), table, *failures)


def _age(since: float) -> float:
    return time.monotonic() - since


def _progress(job: Job) -> tuple[int, float]:
    """Epochs done and images/s in the latest, from the run's metrics.csv; (0, 0.0) before the first."""
    try:
        row = read_metrics(job.folder)[-1]
    except (UserError, IndexError):
        return 0, 0.0
    return int(row["epoch"]) + 1, row.get("images_per_second", 0.0)
