"""The config group `pretrain`: its keys, their types and defaults.

Light to import, as mambapeft_vision/run/config.py is.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import build


@dataclass
class SourceConfig:
    """One set of labelled images, with a head of its own.

    Args:
        path: npz file or class-per-folder tree (mambapeft_vision/data/prepare/importer.py).
        share: share of every batch, relative to the shares of the other sources.
        holdout: share of the images kept for validation, where the source marks none as `test` or `val`.
        group: number of consecutive images that belong together (pictures of one thing) and are held out together.
        flip, grey, invert: probability of mirroring left to right, of losing colour, of inverting brightness.
    """

    path: str = MISSING
    share: float = 1.0
    holdout: float = 0.05
    group: int = 1
    flip: float = 0.5
    grey: float = 0.1
    invert: float = 0.0


@dataclass
class AugmentConfig:
    """Augmentation of all training images, besides each source's own.

    Args:
        min_area: smallest share of the image in a random crop.
        max_aspect: largest ratio of its sides.
        degrees: largest rotation either way.
        jitter: brightness, contrast and saturation are multiplied by 1 ± jitter.
        erase: probability of blanking a rectangle.
    """

    min_area: float = 0.4
    max_aspect: float = 4 / 3
    degrees: float = 10.0
    jitter: float = 0.4
    erase: float = 0.25


@dataclass
class TeacherConfig:
    """EfficientNet-Lite0, whose features the backbone learns to predict too (mambapeft_vision/pretraining/teacher.py).

    Args:
        weight: factor of this loss; the loss of the labels has 1. 0: no teacher.
        size: pixels to a side of the images that the teacher sees.
    """

    weight: float = 0.0
    size: int = 128


@dataclass
class PretrainConfig:
    """A whole pretraining run. Exactly one of `steps` and `minutes` is given.

    Args:
        backbone: as registered with timm, e.g. vim_nano_patch8_64.
        sources: name → labelled images, at least one.
        out: `<out>.safetensors` and `<out>.json` are written.
        architecture: other sizes than the backbone's own, e.g. embed_dim, drop_path_rate.
        augment: augmentation of training images.
        seed: seed of the initial weights, the held-out images and every step.
        batch_size: images a step, of all sources together.
        steps: number of steps of the run.
        minutes: instead of steps: their number follows from the measured speed, so that the schedule ends in time.
        learning_rate: learning rate of AdamW, after the warm-up.
        min_lr: where the cosine ends.
        warmup_steps: linear; a cosine follows.
        weight_decay: weight decay of matrices and convolutions.
        clip_norm: largest global norm of the gradient.
        label_smoothing: label smoothing of the cross entropy.
        ema: decay of the average of the weights. This average is validated and saved.
        kernel: auto, or the name of a backend.
        device: auto, cpu, cuda or cuda:N.
        precision: fp32 or bf16 (mixed).
        cuda_graph: on a GPU, capture the step and replay it.
        workers: processes that decode; null: one a CPU.
        evaluations: validations on the way.
        checkpoint_every_s: seconds between checkpoints, from which the same command continues an interrupted run.
        teacher: the teacher whose features the backbone learns to predict too.
    """

    backbone: str = MISSING
    sources: dict[str, SourceConfig] = MISSING
    out: str = MISSING
    architecture: dict[str, Any] = field(default_factory=dict)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0
    batch_size: int = 1024
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 2e-3
    min_lr: float = 1e-5
    warmup_steps: int = 300
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    ema: float = 0.999
    kernel: str = "auto"
    device: str = "auto"
    precision: str = "bf16"
    cuda_graph: bool = True
    workers: int | None = None
    evaluations: int = 8
    checkpoint_every_s: float = 60.0
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def check(self) -> None:
        """Raises UserError for values outside their range."""
        if (self.steps is None) == (self.minutes is None):
            raise UserError(
                f"pretrain.steps={self.steps}, pretrain.minutes={self.minutes}; expected exactly one of them: set the "
                f"other one to null"
            )
        if not self.sources:
            raise UserError("pretrain.sources is empty; expected at least one source: pretrain.sources.NAME.path=PATH")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"pretrain.precision={self.precision!r}; expected fp32 or bf16")
        for key, value in (("steps", self.steps), ("evaluations", self.evaluations), ("workers", self.workers)):
            if value is not None and value < 1:
                raise UserError(f"pretrain.{key}={value}; expected at least 1")
        if self.batch_size < len(self.sources):
            raise UserError(f"pretrain.batch_size={self.batch_size}; expected at least one image for each source")


def config_of(cfg: DictConfig) -> PretrainConfig:
    """The checked section `pretrain` of a composed config. Raises UserError, or OmegaConf's error for missing keys."""
    content = OmegaConf.to_container(cfg.pretrain, resolve=True, throw_on_missing=True)
    config = build(PretrainConfig, content, "pretrain")
    config.check()
    return config


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises UserError for overrides that pretraining would ignore."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition(".")[0].partition("@")[0] not in ("pretrain", "experiment", "hydra"):
            raise UserError(f"{override} means nothing to pretraining; expected its own keys, e.g. pretrain.steps=100")


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    """The config in plain containers."""
    return dataclasses.asdict(config)
