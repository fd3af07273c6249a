"""The keys of the configs and their types. Values live in configs/*.yaml, never here.

What each key means stands in the docstring of its section; `mambapeft keys` prints it beside type and default. The keys
of backbone, dataset, logger and method are the arguments of what their `_target_` names, which checks them.

Light to import: `--help`, tab completion and config errors do not wait for PyTorch.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.pretraining.config import PretrainConfig

GIVEN, OF_VIM_S = METHOD_SIZES = ("given", "of_vim_s")


@dataclass
class PathsConfig:
    """Where files are.

    Args:
        data: folder of the tasks' folders.
        outputs: folder of the runs' folders.
        cache: folder of decoded images, kept below 40 GiB; null decodes them in every run.
        methods: folder with method files of your own, whose code is run.
        backbones: folder with backbone files of your own, whose code is run.
    """

    data: str = MISSING
    outputs: str = MISSING
    cache: str | None = MISSING
    methods: str | None = MISSING
    backbones: str | None = MISSING


@dataclass
class TrainConfig:
    """A run: the root of configs/train.yaml.

    Args:
        backbone: the frozen model; a file of configs/backbone.
        dataset: the task; a file of configs/dataset.
        trainer: the recipe; a file of configs/trainer.
        logger: where the run is reported to, beside its folder; a file of configs/logger.
        method: methods by name; files of configs/method, such as method=[lora_in_proj,affix].
        method_sizes: given, or of_vim_s: ranks and widths are those of Vim-S and keep their share of the channels.
        seed: decides the methods' initial tensors, the order of images, dropout and drop path.
        kernel: auto, or the name of a kernel backend; what runs is printed.
        resume: true continues an unfinished run and skips a finished one; false begins anew, the old folder is kept.
        dry_run: show what would be trained, and train nothing.
        sweep: name of the sweep that the run is part of; sweeps set it, so that loggers can group their runs.
        paths: where files are.
        pretrain: pretrains a backbone instead of fine-tuning one; a file of configs/pretrain.
    """

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
    pretrain: Any = None  # PretrainConfig, or None: OmegaConf has no such type for a config group


@dataclass
class EvaluatePathsConfig:
    """Where files are, for an evaluation.

    Args:
        cache: folder of decoded images; null decodes them. The run's own setting is ignored.
        methods: folder with method files of your own, whose code is run.
        backbones: folder with backbone files of your own, whose code is run.
    """

    cache: str | None = MISSING
    methods: str | None = MISSING
    backbones: str | None = MISSING


@dataclass
class EvaluateConfig:
    """An evaluation: the root of configs/evaluate.yaml.

    Args:
        run: folder of a finished run.
        kernel: as for a run; null takes what the run was asked for.
        device: auto, cpu, cuda or cuda:N.
        dataset_folder: where the images are now, if they have moved.
        backbone_weights: where the backbone's weights are now, if they have moved.
        paths: where files are.
    """

    run: str = MISSING
    kernel: str | None = MISSING
    device: str = MISSING
    dataset_folder: str | None = MISSING
    backbone_weights: str | None = MISSING
    paths: EvaluatePathsConfig = MISSING


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """A composed config in plain containers, interpolations resolved. Raises OmegaConf's error for missing values."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cast(dict[str, Any], container)  # a DictConfig becomes a dict whose keys are the schema's names


@cache
def register_schemas() -> None:
    """Makes the schemas known to Hydra, under the names that the root configs list first."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(group="pretrain", name="base", node=PretrainConfig)
