"""From a registered name to a model, through timm's builder; every registered backbone calls `build`."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from mambapeft_vision.backbones.timm_model import TimmModel

Model = TypeVar("Model", bound=TimmModel)
EMBEDDED_WEIGHTS = Path(__file__).parent / "weights"  # weights made by this project, shipped with the package
_OF_OTHERS = ("local-dir", "hf-hub")  # timm's words for models whose sizes a folder's config.json names
# Arguments of timm's builder that are no sizes of a model.
_BUILDER = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "out_indices", "feature_cls")


def cfg(img_size: int = 224, **entries: Any) -> dict[str, Any]:
    """timm's record of a model: its input and normalisation, and where weights come from.

    entries: others of `timm.models.PretrainedCfg`. `license` is None where no licence of the weights was found.
    """
    return {
        "input_size": (3, img_size, img_size),
        "fixed_input_size": True,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **entries,
    }


def build(kind: type[Model], name: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> Model:
    """The model `name`, or with `features_only` timm's feature extractor around it.

    Args:
        kind: its class.
        pretrained: load the weights that its record names, or those of `pretrained_cfg_overlay` (file, url, …).
        sizes: sizes of this variant; `kwargs` may change them.
        kwargs: arguments of `timm.create_model`: sizes, device and dtype, `features_only`, `pretrained_cfg_overlay`, …;
            `weights_license="accepted"` lets weights be fetched for which no licence was found.
    """
    accepted = kwargs.pop("weights_license", None)
    builder = {key: kwargs.pop(key) for key in _BUILDER if key in kwargs}
    record = resolve_pretrained_cfg(name, builder.get("pretrained_cfg"), builder.get("pretrained_cfg_overlay"))
    sizes = {**sizes, **kwargs}
    if record.source in _OF_OTHERS:
        _check_sizes(kind, name, sizes)

    def make(device: Any = None, dtype: torch.dtype | None = None, **arguments: Any) -> Model:
        with nullcontext() if device is None else torch.device(device):
            model = kind(**arguments)
        model.architecture = {key: value for key, value in sizes.items() if key in _sizes_of(kind)}
        model.pretrained_cfg = record.to_dict()
        if pretrained:
            from mambapeft_vision.backbones.weights import load_pretrained

            load_pretrained(model, accepted)
        return model if dtype is None else model.to(dtype)

    # timm's own loader would neither compare keys strictly nor know what a file is for: `make` has loaded the weights.
    model: Any = build_model_with_cfg(
        make, name, pretrained=False, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **builder, **sizes
    )
    inner: Model = getattr(model, "model", model)
    inner.pretrained_cfg["input_size"] = (inner.in_chans, *inner.patch_embed.img_size)
    return model


def _check_sizes(kind: type[nn.Module], name: str, sizes: Mapping[str, Any]) -> None:
    """Raises UserError for sizes out of range or beyond a machine's memory, before anything is made of them."""
    from mambapeft_vision.backbones import registry  # which imports the files that import this one

    architecture = {key: value for key, value in sizes.items() if key in _sizes_of(kind)}
    registry.check_sizes(kind, architecture)
    registry.check_parameters(name, architecture)


def _sizes_of(kind: type[nn.Module]) -> set[str]:
    return set(inspect.signature(kind).parameters) - {"num_classes"}
