"""Progress of long work: how far, how fast, how much longer; on a terminal as one live display."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


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
        """Counts more units, and reports if a report is due."""
        self._done += units
        now = self._clock()
        finished = self._done == self._total
        if self._callback is not None and (finished or now - self._last_report >= self._interval):
            self._last_report = now
            self._callback(Progress(self._done, self._total, now - self._start, self._resumed))


class LiveDisplay:
    """A display that is rewritten at the end of a terminal's output; elsewhere a plain line every `every_s` seconds.

    A stream that cannot be written (a full disk, a closed pipe) is ignored, because the display is no part of a result.

    Args:
        stream: default: standard output.
        every_s: seconds between two lines where there is no terminal; None: no lines.

    Example:
        >>> display = LiveDisplay()
        >>> display.show("3/10 runs")        # any renderable of rich, such as a table
        >>> display.clear()                  # gone; `finish` would leave it standing
    """

    def __init__(self, stream: TextIO | None = None, every_s: float | None = 10.0) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._every_s = every_s
        self._next_line_at = 0.0
        self._live: Live | None = None
        self.on_terminal = _is_terminal(self._stream)

    def show(self, content: "RenderableType", line: str | None = None, *, now: bool = False) -> None:
        """Shows `content` in the place of the content before.

        Args:
            line: printed if there is no terminal; default: the content as text.
            now: print the line whether it is due or not.
        """
        with suppress(*CANNOT_WRITE):
            if self.on_terminal:
                self._started().update(_fitted(content), refresh=True)
            elif now or (self._every_s is not None and time.monotonic() >= self._next_line_at):
                self._next_line_at = time.monotonic() + (self._every_s or 0.0)
                print(str(content) if line is None else line, file=self._stream, flush=True)

    def clear(self) -> None:
        """Removes the content."""
        self._stop(transient=True)

    def finish(self) -> None:
        """Leaves the content on the terminal, as ordinary lines."""
        self._stop(transient=False)

    def _started(self) -> "Live":
        if self._live is None:
            from rich.console import Console  # not needed without a terminal
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            self._live = Live(
                console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False, transient=True
            )
            self._live.start()
        return self._live

    def _stop(self, transient: bool) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.transient = transient
            with suppress(*CANNOT_WRITE):
                live.stop()


# Errors of writing to a stream: the disk is full, the reader has gone, or the stream was closed.
CANNOT_WRITE = (OSError, ValueError)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except CANNOT_WRITE:
        return False


def _fitted(content: "RenderableType") -> "RenderableType":
    """Text in one line that is cut at the terminal's edge; other content as it is."""
    from rich.text import Text

    return Text(content, no_wrap=True, overflow="ellipsis") if isinstance(content, str) else content


class ConsoleProgress:
    """Callback that shows `label: 512/1,000 images, 812 images/s, 0:12 left`, on a terminal with a bar.

    A terminal gets one line that is rewritten; a log file gets a new line every ten seconds.
    `unit="B"` prints bytes as MB.
    """

    def __init__(self, label: str, unit: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._unit = unit
        self._display = LiveDisplay(stream if stream is not None else sys.stderr, every_s=None)
        self._next_line_at = 0.0

    def __call__(self, progress: Progress) -> None:
        finished = progress.done == progress.total
        if self._display.on_terminal:
            self._display.show(self._with_bar(progress))
        elif finished or progress.seconds >= self._next_line_at:
            self._next_line_at = progress.seconds + 10.0
            self._display.show(self._text(progress), now=True)
        if finished:
            self._display.finish()

    def _with_bar(self, progress: Progress) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(progress.total, progress.done, width=20), _fitted(self._text(progress)))
        return row

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
