"""Checkpoints of a run in progress: whole or absent, small, and read without running anything in them."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from mambapeft_vision.utils.atomic import atomic_path
from mambapeft_vision.utils.errors import UserError

CHECKPOINT_FILE = "checkpoint.ckpt"
_NEEDED = {"epoch", "global_step", "loops", "state_dict", "optimizer_states"}


class AtomicCheckpointIO(CheckpointIO):
    """Writes through a temporary file; reads with PyTorch's restricted unpickler."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()  # PyTorch's own writing of files does not say what a disk has against it
        torch.save(checkpoint, content)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads with `weights_only=True`, whatever is asked for. Raises UserError for a damaged file."""
        try:
            content = torch.load(path, map_location=map_location, weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # the restricted unpickler raises anything on bytes that are no pickle
            raise UserError(
                f"{path} cannot be read as a checkpoint ({type(error).__name__}); delete it to train this run "
                f"from its start"
            ) from error
        if not isinstance(content, dict) or not content.keys() >= _NEEDED:
            raise UserError(f"{path} is no checkpoint of a run; delete it to train this run from its start")
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
