"""The checkpoint of an unfinished run: continued if it is whole and its inputs are unchanged, otherwise set aside."""

import os
from collections.abc import Callable
from pathlib import Path

from mambapeft_vision.engine.checkpoint import INPUTS, AtomicCheckpointIO
from mambapeft_vision.results.layout import CHECKPOINT_FILE, METRICS_FILE
from mambapeft_vision.run.inputs import Fingerprints, changed
from mambapeft_vision.run.run_config import free_name
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import build


def settle_checkpoint(folder: Path, now: Fingerprints, say: Callable[[str], None]) -> None:
    """Keeps a checkpoint in a run's folder if the run can continue from it; otherwise sets it aside and says why.

    Args:
        now: hashes of what the run is made from now.
        say: called with a line for the user.
    """
    file = folder / CHECKPOINT_FILE
    if not os.path.lexists(file):
        return
    reason = _reason_against(file, now)
    if not reason:
        return
    aside = free_name(folder)
    aside.mkdir()
    for name in (CHECKPOINT_FILE, METRICS_FILE):
        if os.path.lexists(folder / name):
            (folder / name).rename(aside / name)
    say(f"{reason}. This run begins from its start; what was there is kept in {aside}")


def _reason_against(file: Path, now: Fingerprints) -> str:
    """Why the run cannot continue from a checkpoint, or ""."""
    try:
        content = AtomicCheckpointIO().load_checkpoint(file, map_location="cpu")
        then = build(Fingerprints, content.get(INPUTS), str(file))
    except UserError as error:
        return f"{file} is damaged or no checkpoint of this run ({error})"
    difference = changed(then, now)
    return f"{file} was made from other {difference}" if difference else ""
