"""`python train.py experiment=pretrain dataset=NAME path=...`: pretraining by the command that fine-tunes.

Light to import: `train.py --help` does not wait for PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.utils.errors import UserError

SWITCH = "experiment=pretrain"


def is_pretraining(arguments: Sequence[str]) -> bool:
    return SWITCH in arguments


def translated(arguments: Sequence[str], configs: Path) -> tuple[Path, list[str]]:
    """The config file and the overrides of scripts/pretrain.py that stand for a command line of train.py.

    `dataset=NAME` is configs/pretrain/NAME.yaml (default: folder), `path=` is short for sources.mine.path; all
    else is a key of that config. Raises UserError for what only fine-tuning knows.
    """
    name, overrides = "folder", []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument.startswith("-"):
            raise UserError(
                f"{argument} does not go with {SWITCH}; expected key=value, as in {configs}/pretrain/*.yaml"
            )
        if key == "dataset":
            name = value
        elif key == "path":
            overrides.append(f"sources.mine.path={value}")
        elif argument != SWITCH:
            overrides.append(argument)
    known = sorted(file.stem for file in (configs / "pretrain").glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"dataset={name} is no set to pretrain on; expected one of {', '.join(known)} (configs/pretrain)"
        )
    return configs / "pretrain" / f"{name}.yaml", overrides
