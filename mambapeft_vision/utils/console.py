"""What a run says: lines on the terminal and in train.log, and one live line that is rewritten on a terminal."""

import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO


class Console:
    """Prints to `stream`, and appends everything but the live line to a log file.

    Args:
        log: the log file; None: no file.
        stream: default: standard output.
    """

    def __init__(self, log: Path | None = None, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._log = None if log is None else open(log, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._live = self._stream.isatty()
        self._dirty = False  # a live line stands on the terminal

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
        print(text, file=self._stream, flush=True)
        self._write_log(text)

    def note(self, text: str) -> None:
        """A line for the log; where there is no terminal with a live line, also for the output."""
        if not self._live:
            print(text, file=self._stream, flush=True)
        self._write_log(text)

    def live(self, text: str) -> None:
        """Rewrites the terminal's live line; nothing elsewhere."""
        if self._live:
            print(f"\r\033[K{text}", end="", file=self._stream, flush=True)
            self._dirty = True

    def clear(self) -> None:
        if self._dirty:
            print("\r\033[K", end="", file=self._stream, flush=True)
            self._dirty = False

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            with suppress(OSError):  # a full disk ends a run where it cannot keep its state, not at a line for people
                print(text, file=self._log, flush=True)
