"""failure.json: how a run failed, in its folder until an attempt succeeds."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from mambapeft_vision.results.layout import FAILURE_FILE
from mambapeft_vision.run.exit import summary
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.lock import InUseError


@contextmanager
def failures_noted(folder: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Notes an error that ends a run in its folder, and passes it on. A run of another process has not failed."""
    try:
        yield
    except InUseError:
        raise
    except Exception as error:
        note_failure(folder, error, overrides)
        raise


def note_failure(folder: Path, error: Exception, overrides: Sequence[str]) -> None:
    """Writes the error that ended the run. If the disk itself failed, nothing is written."""
    write_failure(folder, summary(error), type(error).__name__, "".join(traceback.format_exception(error)), overrides)


def write_failure(folder: Path, error: str, kind: str, trace: str, overrides: Sequence[str]) -> None:
    """As `note_failure`. kind: the error's class, e.g. NotFiniteError; trace: may be empty."""
    content = {
        "error": error,
        "kind": kind,
        "traceback": trace,
        "overrides": list(overrides),
        "failed_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FAILURE_FILE, content)


def forget_failure(folder: Path) -> None:
    """Deletes failure.json, if it is there."""
    (folder / FAILURE_FILE).unlink(missing_ok=True)
