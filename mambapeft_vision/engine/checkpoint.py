"""Checkpoints of a run in progress: whole or absent, small, checked when read, and read without running anything."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from mambapeft_vision.utils.atomic import write_bytes
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.tensor_files import load_checked, with_checksum

INPUTS = "inputs"  # key of the fingerprints of what the run is made from
_NEEDED = {"epoch", "global_step", "loops", "state_dict", "optimizer_states"}
_REMEDY = "delete it to train this run from its start"


class AtomicCheckpointIO(CheckpointIO):
    """Writes atomically, with a checksum; reads with PyTorch's restricted unpickler, after checking the checksum."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_bytes(path, with_checksum(checkpoint))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads with `weights_only=True`, whatever is asked for. Raises UserError."""
        try:
            content = load_checked(path, map_location=map_location)
        except (UserError, OSError) as error:
            raise UserError(f"{error}; {_REMEDY}") from error
        if not isinstance(content, dict) or not content.keys() >= _NEEDED:
            raise UserError(f"{path} is no checkpoint of a run; {_REMEDY}")
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
