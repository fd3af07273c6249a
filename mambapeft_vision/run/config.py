"""The keys of the configs and their types. Values live in configs/*.yaml, never here.

Light to import: `--help`, tab completion and config errors do not wait for PyTorch.
"""

from dataclasses import dataclass
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.pretraining.config import PretrainConfig

GIVEN, OF_VIM_S = METHOD_SIZES = ("given", "of_vim_s")


@dataclass
class PathsConfig:
    data: str = MISSING
    outputs: str = MISSING
    cache: str | None = MISSING
    methods: str | None = MISSING


@dataclass
class TrainConfig:
    backbone: dict[str, Any] = MISSING
    dataset: dict[str, Any] = MISSING
    trainer: TrainerConfig = MISSING
    logger: dict[str, Any] = MISSING
    method: dict[str, Any] = MISSING
    method_sizes: str = MISSING
    seed: int = MISSING
    kernel: str = MISSING
    resume: bool = MISSING
    dry_run: bool = MISSING
    sweep: str | None = MISSING
    paths: PathsConfig = MISSING
    pretrain: Any = None  # a PretrainConfig: pretraining, in place of all of the above


@dataclass
class MethodPathsConfig:
    methods: str | None = MISSING


@dataclass
class EvaluateConfig:
    run: str = MISSING
    kernel: str | None = MISSING
    device: str = MISSING
    dataset_folder: str | None = MISSING
    backbone_weights: str | None = MISSING
    paths: MethodPathsConfig = MISSING


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """A composed config in plain containers, interpolations resolved. Raises OmegaConf's error for missing values."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cast(dict[str, Any], container)  # a DictConfig becomes a dict whose keys are the schema's names


def register_schemas() -> None:
    """Makes the schemas known to Hydra, under the names that the root configs list first."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(group="pretrain", name="base", node=PretrainConfig)
