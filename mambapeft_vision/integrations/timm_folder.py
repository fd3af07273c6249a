"""A merged model as a folder that timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

import inspect
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import save_for_hf

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.integrations.same_logits import images
from mambapeft_vision.utils.atomic import atomic_folder
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.tensor_files import system_errors


def plain_backbone(model: AdaptedModel, source: str) -> TimmModel:
    """Merges a model whose methods all are functions of weights, and returns its backbone, an ordinary model.

    Raises: UserError naming the methods that cannot be merged, and why.
    """
    merge_all(model, f"{source} cannot become a plain checkpoint")
    return cast(TimmModel, model.backbone)


def merge_all(model: AdaptedModel, otherwise: str) -> None:
    """Merges a model. Raises UserError that says `otherwise`, and which methods cannot be merged, and why."""
    left = model.merge()
    if left:
        reasons = "\n  ".join(f"{name}: {reason}" for name, reason in left.items())
        raise UserError(f"{otherwise}:\n  {reasons}")


def to_timm(model: AdaptedModel, folder: str | Path, source: str) -> None:
    """Writes config.json and model.safetensors, as `timm.models.save_for_hf` does, and loads them again.

    Raises: UserError where methods cannot be merged, or where the folder computes other logits; nothing is left then.
    """
    backbone = plain_backbone(model, source).cpu()
    inputs = images(model)
    with atomic_folder(Path(folder)) as temporary, system_errors(folder), torch.no_grad():
        save_for_hf(backbone, str(temporary), model_args=_sizes_of(backbone), safe_serialization=True)
        again = timm.create_model(f"local-dir:{temporary}", pretrained=True).eval()
        if not torch.allclose(again(inputs), backbone(inputs), rtol=1e-4, atol=1e-5):
            raise UserError(f"{folder} computes other logits than {source}; please report this with timm's version")


def _sizes_of(backbone: TimmModel) -> dict[str, Any]:
    """The sizes that make a backbone as it is now: an additional scan has given its mixers more states."""
    sizes = dict(backbone.architecture)
    if "d_state" in inspect.signature(type(backbone)).parameters:
        sizes["d_state"] = cast(Backbone, backbone).mixers[0].d_state
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
