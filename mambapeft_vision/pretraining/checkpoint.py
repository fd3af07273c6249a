"""The state of an unfinished pretraining run: saved now and then, read by the same command, deleted at the end."""

from collections.abc import Iterable
from pathlib import Path

import torch

from mambapeft_vision.engine.checkpoint import AtomicCheckpointIO
from mambapeft_vision.pretraining.config import PretrainConfig, to_dict
from mambapeft_vision.pretraining.module import STATE
from mambapeft_vision.pretraining.sources import Source
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_json
from mambapeft_vision.utils.identity import UNDECIDING_IN_PRETRAINING


def checkpoint_file(config: PretrainConfig) -> Path:
    """The file with the state of an unfinished run of this config."""
    out = Path(config.out)
    return out.with_name(f"{out.name}.checkpoint")


def identity(config: PretrainConfig, sources: Iterable[Source], device: torch.device) -> str:
    """sha256 of all that decides the weights: settings, images, kind of device."""
    settings = {key: value for key, value in to_dict(config).items() if key not in UNDECIDING_IN_PRETRAINING}
    settings["sources"] = {
        source.name: {**settings["sources"][source.name], "path": source.sha256} for source in sources
    }
    return sha256_json([settings, device.type])


def steps_done_in(file: Path, identity: str) -> int:
    """The number of steps that a checkpoint contains. Raises UserError if it is damaged or of another run."""
    state = AtomicCheckpointIO().load_checkpoint(file, map_location="cpu").get(STATE)
    if not isinstance(state, dict) or state.get("identity") != identity:
        raise UserError(
            f"{file} is of an unfinished run with other settings, images or another kind of device; expected the same "
            "command again. Delete it to start from the beginning, or give another pretrain.out=PATH"
        )
    return state["step"]
