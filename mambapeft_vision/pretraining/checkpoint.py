"""The state of an unfinished pretraining run: written now and then, read by the same command, gone at the end."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mambapeft_vision.pretraining.config import PretrainConfig, to_dict
from mambapeft_vision.pretraining.sources import Source
from mambapeft_vision.utils.atomic import atomic_path
from mambapeft_vision.utils.errors import UserError

# Where things lie and how they are watched decides nothing; of a source its content counts, not its path.
_NEUTRAL = ("out", "device", "workers", "evaluations", "checkpoint_every_s")


def checkpoint_file(config: PretrainConfig) -> Path:
    out = Path(config.out)
    return out.with_name(f"{out.name}.checkpoint")


def identity(config: PretrainConfig, sources: Iterable[Source], device: torch.device) -> str:
    """sha256 of all that decides the weights: settings, images, kind of device."""
    settings = {key: value for key, value in to_dict(config).items() if key not in _NEUTRAL}
    settings["sources"] = {
        source.name: {**settings["sources"][source.name], "path": source.sha256} for source in sources
    }
    return hashlib.sha256(json.dumps([settings, device.type], sort_keys=True).encode()).hexdigest()


def write_checkpoint(file: Path, identity: str, state: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        torch.save({"identity": identity, "state": state}, temporary)


def read_checkpoint(file: Path, identity: str, device: torch.device) -> dict[str, Any] | None:
    """The state, or None where there is no checkpoint. Raises UserError for one that is damaged or of another run."""
    if not file.is_file():
        return None
    try:
        content = torch.load(file, map_location=device, weights_only=True)
        found, state = content["identity"], content["state"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}: {error}); delete it to start from the beginning."
        ) from error
    if found != identity:
        raise UserError(
            f"{file} is of an unfinished run with other settings, images or another kind of device; expected the same "
            "command again. Delete it to start from the beginning, or give another out=PATH."
        )
    return state
