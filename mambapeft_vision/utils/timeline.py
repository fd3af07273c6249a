"""When a run reached what: seconds from the start of its process, in a sweep from the end of the run before it.

Marks cost a microsecond and are taken always, because what a slow start waited for is asked afterwards.
"""

import os
import time
from contextlib import suppress
from pathlib import Path


def process_started() -> float:
    """When this process began, on the monotonic clock; to 10 ms. Where Linux does not say it, the present time."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        # The name of the program, in parentheses, may hold spaces; field 22 of the line is the 20th behind it.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - age
    return time.monotonic()


_marks: list[tuple[str, float]] = []
_begun: float | None = None  # None: with the process


def mark(what: str) -> None:
    """Notes that `what` is done now."""
    _marks.append((what, time.monotonic()))


def begin() -> None:
    """Starts anew: what follows is counted from now."""
    global _begun
    _marks.clear()
    _begun = time.monotonic()


def reached() -> str:
    """The marks so far, such as `imports 4.1, images 5.2, first step 6.0`."""
    begun = process_started() if _begun is None else _begun
    return ", ".join(f"{what} {when - begun:.1f}" for what, when in _marks)
