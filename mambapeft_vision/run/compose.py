"""From overrides to a composed config, without a command line."""

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.utils.paths import configs_folder

Files = tuple[tuple[Path, int], ...]


def compose(
    root: str, overrides: Sequence[str], config_dir: str | Path | None = None, configs: Path | None = None
) -> DictConfig:
    """A config as the commands compose it.

    Hydra takes 60 ms for it, most of them for the files of the chosen options. Configs that differ in values alone
    (`trainer.max_epochs=3`) are made from one that Hydra composed: as long as no file of `configs` changes.

    Args:
        root: "train", "evaluate" or a config in Hydra's store.
        overrides: as on the command line, such as `method=[a,d]` or `trainer.max_epochs=3`.
        config_dir: a folder with options of your own, such as method/mine.yaml.
        configs: the folder with train.yaml, if it is not the package's.
    Raises: Hydra's and OmegaConf's exceptions, which run/exit.py describes.
    """
    configs = configs or configs_folder()
    choices = [text for text in overrides if _is_choice(text, configs)]
    values = [text for text in overrides if text not in choices]
    in_files = (configs / f"{root}.yaml").is_file()  # Hydra's store, which has others, may change
    if config_dir is None and in_files and all(map(_is_value, values)):
        try:
            return _with_values(_chosen(root, tuple(choices), configs, _files(configs)), values)
        except (HydraException, OmegaConfBaseException):
            pass  # Hydra says what is wrong, below
    searched = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    return _by_hydra(root, [*searched, *overrides], configs)


def _by_hydra(root: str, overrides: list[str], configs: Path) -> DictConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(configs), version_base="1.3"):
        return hydra.compose(root, overrides)


@lru_cache(maxsize=256)
def _chosen(root: str, choices: tuple[str, ...], configs: Path, files: Files) -> DictConfig:
    """The config of these options, not to be changed. files: as they are now; of others the config is composed anew."""
    return _by_hydra(root, list(choices), configs)


def _files(configs: Path) -> Files:
    """The files below a folder, and when they were changed."""
    return tuple((file, file.stat().st_mtime_ns) for file in sorted(configs.rglob("*.yaml")))


def _is_choice(override: str, configs: Path) -> bool:
    """Whether it chooses an option of a folder of configs."""
    group = override.partition("=")[0].partition("@")[0].removeprefix("+")
    return all(part.isidentifier() for part in group.split("/")) and (configs / group).is_dir()


def _is_value(override: str) -> bool:
    """Whether it changes or adds a value, and nothing of Hydra's own."""
    parts = override.partition("=")[0].removeprefix("+").split(".")
    return all(part.isidentifier() for part in parts) and parts[0] != "hydra"


def _with_values(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A copy with these values. Raises Hydra's and OmegaConf's exceptions where there is anything unusual."""
    cfg = deepcopy(cfg)
    for override in map(_parsed, overrides):
        if override.is_sweep_override() or (
            override.is_add() and OmegaConf.select(cfg, override.key_or_group, throw_on_missing=False) is not None
        ):
            raise HydraException(override.input_line)
        OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=override.is_add())
    return cfg


@lru_cache(maxsize=4096)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)
