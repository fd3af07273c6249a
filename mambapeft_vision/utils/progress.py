"""Progress of long work on the data: how far, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Progress:
    """One report: `done` of `total` units (None where unknown), after `seconds` of work.

    The first `resumed` units were there before the work began, so they do not count in the rate.
    """

    done: int
    total: int | None
    seconds: float
    resumed: int = 0

    @property
    def rate(self) -> float:
        """Units per second since the start; 0.0 before the first unit."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at the present rate; None while that cannot be told."""
        if self.total is None or self.rate == 0.0:
            return None
        return (self.total - self.done) / self.rate


ProgressCallback = Callable[[Progress], None]


class ProgressMeter:
    """Counts units and calls `callback` at most every `interval` seconds, and once at the end."""

    def __init__(
        self,
        total: int | None,
        callback: ProgressCallback | None,
        *,
        resumed: int = 0,
        interval: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._callback = callback
        self._interval = interval
        self._clock = clock
        self._done = self._resumed = resumed
        self._start = self._last_report = clock()

    def advance(self, units: int = 1) -> None:
        self._done += units
        now = self._clock()
        finished = self._done == self._total
        if self._callback is not None and (finished or now - self._last_report >= self._interval):
            self._last_report = now
            self._callback(Progress(self._done, self._total, now - self._start, self._resumed))


class ConsoleProgress:
    """Callback that prints `label: 512/1,000 images, 812 images/s, 0:12 left`.

    A terminal gets one line that is rewritten; a log file gets a new line every ten seconds.
    `unit="B"` prints bytes as MB.
    """

    def __init__(self, label: str, unit: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._unit = unit
        self._stream = stream if stream is not None else sys.stderr
        self._next_line_at = 0.0

    def __call__(self, progress: Progress) -> None:
        finished = progress.done == progress.total
        if self._stream.isatty():
            self._stream.write(f"\r\033[K{self._text(progress)}" + ("\n" if finished else ""))
        elif finished or progress.seconds >= self._next_line_at:
            self._next_line_at = progress.seconds + 10.0
            self._stream.write(self._text(progress) + "\n")
        self._stream.flush()

    def _text(self, progress: Progress) -> str:
        scale, unit = (1e6, "MB") if self._unit == "B" else (1.0, self._unit)
        total = "?" if progress.total is None else f"{progress.total / scale:,.0f}"
        eta = progress.eta_seconds
        left = "" if eta is None else f", {format_duration(eta)} left"
        done, rate = f"{progress.done / scale:,.0f}", f"{progress.rate / scale:,.1f}"
        return f"{self._label}: {done}/{total} {unit}, {rate} {unit}/s{left}"


def format_duration(seconds: float) -> str:
    """`75.2` → `1:15`, `3700` → `1:01:40`."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
