"""Checkpoints of a run in progress: whole or absent, small, and read without running anything in them."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from mambapeft_vision.atomic import atomic_path
from mambapeft_vision.errors import UserError

CHECKPOINT_FILE = "checkpoint.ckpt"


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
            return torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read as a checkpoint ({type(error).__name__}); delete it to train this run "
                f"from its start"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
