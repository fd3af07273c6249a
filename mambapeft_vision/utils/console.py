"""The output of a run: lines on the terminal and in train.log, and one live line that is rewritten on a terminal."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from mambapeft_vision.utils.atomic import open_log
from mambapeft_vision.utils.progress import CANNOT_WRITE, LiveDisplay
from mambapeft_vision.utils.text import lines, plain


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, without control characters that the names in it may have.

    If the stream cannot be written (a full disk, a closed pipe), the line is lost and the program continues.

    Args:
        stream: default: standard output.
    """
    with suppress(*CANNOT_WRITE):
        print(lines(text), file=sys.stdout if stream is None else stream, flush=True)


def warn(text: str, *, once: bool = False) -> None:
    """A Python warning, which ends nothing: where warnings are errors (PYTHONWARNINGS=error), a line on stderr.

    once: the place of the warning is the caller's, whoever called that: Python shows a text once for each place.
    """
    try:
        warnings.warn(text, stacklevel=2 if once else 3)
    except UserWarning:
        say(f"warning: {text}", sys.stderr)


@contextmanager
def warned_of(what: str) -> Iterator[None]:
    """Turns any error into a line on stderr, for work that must not fail a result, such as pictures."""
    try:
        yield
    except Exception as error:
        say(f"warning: {plain(what)}: {type(error).__name__}: {plain(error)}", sys.stderr)


class Console:
    """Prints to `stream`, and appends everything but the live line to a log file.

    A stream or a log that cannot be written does not end a run. A full disk ends it where it cannot save its state.

    Args:
        log: the log file; None: no file. A link or a pipe there is refused with a UserError.
        stream: default: standard output.
    """

    def __init__(self, log: Path | None = None, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        # Closed in __exit__.
        self._log = None if log is None else open(open_log(log), "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._display = LiveDisplay(self._stream, every_s=None)

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
        if error is not None:
            self._write_log(f"stopped by {type(error).__name__}: {error}")
        if self._log is not None:
            with suppress(OSError):
                self._log.close()

    def say(self, text: str) -> None:
        """A line for the terminal and the log."""
        self.clear()
        self._print(text)
        self._write_log(text)

    def note(self, text: str) -> None:
        """A line for the log; where there is no terminal with a live line, also for the output."""
        if not self._display.on_terminal:
            self._print(text)
        self._write_log(text)

    def live(self, text: str) -> None:
        """Rewrites the terminal's live line; nothing elsewhere."""
        self._display.show(text)

    def clear(self) -> None:
        """Removes the live line."""
        self._display.clear()

    def _print(self, text: str) -> None:
        say(text, self._stream)

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            with suppress(OSError):
                print(lines(text), file=self._log, flush=True)
