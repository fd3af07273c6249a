"""From overrides to a composed config, without a command line."""

from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.utils.paths import configs_folder


def compose(root: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> DictConfig:
    """A config as the commands compose it.

    Args:
        root: "train" or "evaluate".
        overrides: as on the command line, such as `method=[a,d]` or `trainer.max_epochs=3`.
        config_dir: a folder with options of your own, such as method/mine.yaml.
    Raises: Hydra's and OmegaConf's exceptions, which run/exit.py describes.
    """
    register_schemas()
    searched = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    with hydra.initialize_config_dir(str(configs_folder()), version_base="1.3"):
        return hydra.compose(root, [*searched, *overrides])
