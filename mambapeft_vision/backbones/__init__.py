"""Backbones: plain models with ports, registered with timm."""

from typing import Any

import timm
import torch
from torch import nn

from mambapeft_vision.backbones import vim, vit
from mambapeft_vision.backbones.checkpoints import load_official, load_weights
from mambapeft_vision.errors import UserError

__all__ = ["create_backbone", "vim", "vit"]


def create_backbone(name: str, weights: str = "official", seed: int = 0, **architecture: Any) -> nn.Module:
    """A backbone with its weights.

    Args:
        name: as registered with timm, e.g. "vim_small_patch16_224".
        weights: "official" (fetched from the hub or its cache), "random" (drawn from `seed`), or a file.
        seed: of random weights.
        architecture: other sizes than the variant's, e.g. img_size, drop_path_rate.
    """
    if not timm.is_model(name) or not any(hasattr(module, name) for module in (vim, vit)):
        known = ", ".join(sorted(timm.list_models(module="vim") + timm.list_models(module="vit")))
        raise UserError(f"backbone.name={name!r} is unknown; known: {known}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, num_classes=0, **architecture)
        except TypeError as error:
            raise UserError(f"backbone {name}: {error}; its sizes are in mambapeft_vision/backbones") from error
    model.default_cfg["name"] = name
    if weights == "official":
        load_official(model)
    elif weights != "random":
        load_weights(model, weights)
    return model
