"""Backbones: plain models with ports, registered with timm."""

from typing import Any

import timm
import torch
from torch import nn

from mambapeft_vision.backbones import vim, vit
from mambapeft_vision.backbones.architecture import check_sizes
from mambapeft_vision.backbones.weights import load_official, load_weights
from mambapeft_vision.utils.errors import UserError

__all__ = ["create_backbone", "vim", "vit"]


def create_backbone(
    name: str, weights: str = "official", seed: int = 0, weights_sha256: str | None = None, **architecture: Any
) -> nn.Module:
    """A backbone with its weights.

    Args:
        name: as registered with timm, e.g. "vim_small_patch16_224".
        weights: "official" (fetched from the hub or its cache), "random" (drawn from `seed`), or a file.
        seed: of random weights.
        weights_sha256: of the file with the weights (as `sha256sum` prints it); another file is refused.
        architecture: other sizes than the variant's, e.g. img_size, drop_path_rate.
    """
    kind = vim.Vim if hasattr(vim, name) else vit.Vit if hasattr(vit, name) else None
    if kind is None or not timm.is_model(name):
        known = ", ".join(sorted(timm.list_models(module="vim") + timm.list_models(module="vit")))
        raise UserError(f"backbone.name={name!r} is unknown; known: {known}")
    if not 0 <= seed < 2**63:
        raise UserError(f"backbone.seed={seed}; expected 0 to 2^63 - 1")
    check_sizes(kind, architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # `architecture` holds sizes alone by now: timm has arguments that read files and fetch weights.
        model = timm.create_model(name, num_classes=0, **architecture)
    model.default_cfg["name"] = name
    if weights == "official":
        load_official(model, weights_sha256)
    elif weights != "random":
        load_weights(model, weights, weights_sha256)
    elif weights_sha256 is not None:
        raise UserError("backbone.weights=random are no file; leave backbone.weights_sha256 out, or give a file")
    return model
