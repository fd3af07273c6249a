"""From an adapter's files to a model."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.files import CONFIG_FILE, Adapter, read_adapter
from mambapeft_vision.adapter.hub import fetch_adapter, is_repository
from mambapeft_vision.adapter.model import AdaptedModel, on_meta
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.backbones.weights import backbone_sha256, content_sha256
from mambapeft_vision.methods.method import Method
from mambapeft_vision.utils.errors import UserError


def load_adapter(
    folder: str | Path,
    weights: str = "official",
    seed: int = 0,
    revision: str | None = None,
    *,
    num_classes: int | None = None,
) -> AdaptedModel:
    """Builds the backbone that an adapter names, attaches the adapter, and returns the model in evaluation mode.

    Args:
        folder: holds adapter.safetensors and adapter_config.json; or "user/name" of a repository on the Hugging Face
            hub, where there is no such folder.
        weights: the backbone's weights: "official", "random" (drawn from `seed`) or a file. Their hash must be the
            adapter's.
        revision: a branch, tag or commit of the repository; None: its main branch.
        num_classes: gives the model a new zero head of so many classes, to be trained on another task; None: its own.
    Raises: UserError for files that are missing, damaged or do not fit, and for other weights than those trained on.

    Example:
        >>> model = load_adapter("outputs/mini/digits/lora_p_x/seed0-0123456789")  # doctest: +SKIP
        >>> logits = model(images)  # doctest: +SKIP
    """
    if is_repository(folder):
        adapter = read_adapter(fetch_adapter(str(folder), revision))
    elif revision is not None:
        raise UserError(f"revision={revision}, but {folder} is a folder; expected user/name on the hub, or no revision")
    else:
        adapter = read_adapter(folder)
    if num_classes is not None:
        adapter = with_new_head(adapter, num_classes)
    return apply_adapter(adapter, load_backbone(adapter, weights, seed)).to(_dtype(adapter))


def with_new_head(adapter: Adapter, num_classes: int) -> Adapter:
    """The adapter with a zero head for other classes, which have no names."""
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes!r}; expected a whole number >= 1")
    others = {"class_names", "multi_label"}
    config = {**{key: value for key, value in adapter.config.items() if key not in others}, "num_classes": num_classes}
    head = {
        name: t.new_zeros(num_classes, *t.shape[1:]) for name, t in adapter.state.items() if name.startswith("head.")
    }
    return replace(adapter, config=config, state={**adapter.state, **head})


def load_backbone(adapter: Adapter, weights: str = "official", seed: int = 0) -> Any:
    """Builds the backbone that an adapter describes, with nothing attached. weights, seed: see `load_adapter`."""
    check_sizes(adapter)
    backbone = create_backbone(adapter.config["backbone"]["name"], weights, seed, **_architecture(adapter))
    if not _is_trained_on(adapter, backbone):
        backbone.to(_dtype(adapter))  # the adapter may have been trained on weights that were cast before
    return backbone


def _dtype(adapter: Adapter) -> torch.dtype | None:
    return next((t.dtype for t in adapter.state.values() if t.is_floating_point()), None)


def check_sizes(adapter: Adapter) -> None:
    """Checks an adapter against the backbone that it describes, on shapes alone, because its sizes are untrusted.

    Raises: UserError for a backbone that is too large, or tensors that do not fit it.
    """
    with torch.device("meta"):
        backbone = create_backbone(adapter.config["backbone"]["name"], "random", **_architecture(adapter))
    stored = {name.removeprefix("backbone.") for name in adapter.state if name.startswith("backbone.")}
    backbone.not_in_file = tuple(name for name, _ in backbone.named_parameters() if name in stored)
    check_fit(adapter, backbone)


def _architecture(adapter: Adapter) -> dict[str, Any]:
    sizes = adapter.config["backbone"]["architecture"]
    return {key: value for key, value in sizes.items() if key != "num_classes"}  # older adapters have this key


def apply_adapter(adapter: Adapter, backbone: Backbone) -> AdaptedModel:
    """Attaches an adapter to a backbone with the same weights it was trained on; the model is in evaluation mode.

    Raises: UserError when the backbone's sha256 differs, or the tensors do not fit.
    """
    check_backbone(adapter, backbone)
    return attach_adapter(adapter, backbone)


def attach_adapter(adapter: Adapter, backbone: Backbone) -> AdaptedModel:
    """As `apply_adapter`, without the check that the backbone is the one that the adapter was trained on."""
    check_fit(adapter, backbone)
    return _loaded(adapter, backbone)


def check_backbone(adapter: Adapter, backbone: Backbone) -> None:
    """Raises UserError unless the backbone has the architecture and weights that the adapter was trained on."""
    name, mine = adapter.config["backbone"]["name"], backbone.pretrained_cfg["architecture"]
    if name != mine:
        raise UserError(
            f"{adapter.folder} was trained on {name}, but this backbone is {mine}; use backbone.name={name}"
        )
    if not _is_trained_on(adapter, backbone):
        raise UserError(
            f"{adapter.folder} was trained on {name} with weights sha256 {adapter.config['backbone']['sha256'][:12]}…, "
            f"but this backbone has {backbone_sha256(backbone)[:12]}…; load the weights it was trained on "
            f"(backbone.weights=…)"
        )


def _is_trained_on(adapter: Adapter, backbone: Backbone) -> bool:
    """Whether the backbone has the weights that the adapter was trained on."""
    # Older adapters have the hash of resized positions.
    return adapter.config["backbone"]["sha256"] in (backbone_sha256(backbone), content_sha256(backbone))


def build_methods(adapter: Adapter) -> dict[str, Method]:
    """Builds the methods of adapter_config.json; only classes inside `mambapeft_vision.methods` are ever imported."""
    source = f"{adapter.folder / CONFIG_FILE}: methods"
    return {name: build_method(name, spec, source) for name, spec in adapter.config["methods"].items()}


def check_fit(adapter: Adapter, backbone: Backbone) -> AdaptedModel:
    """Attaches an adapter on shapes alone. Raises UserError where its tensors do not fit the backbone."""
    with torch.device("meta"):
        try:
            return _loaded(adapter, on_meta(backbone))
        except UserError as error:
            if str(adapter.folder) in str(error):
                raise
            raise UserError(f"{adapter.folder / CONFIG_FILE}: {error}") from error
        except RuntimeError as error:  # PyTorch's, for sizes beyond all memory
            raise UserError(f"{adapter.folder / CONFIG_FILE}: impossible sizes: {error}") from error


def load_shared(adapter: Adapter, backbone: Backbone) -> AdaptedModel:
    """Attaches an adapter to a copy of a backbone that shares the backbone's tensors, except those the adapter owns.

    The backbone itself is not changed. The model is in evaluation mode.
    Raises: UserError as `apply_adapter`.
    """
    check_backbone(adapter, backbone)
    on_shapes = check_fit(adapter, backbone)
    owned = {id(parameter) for parameter in on_shapes.owned().values()}
    private = {name for name, parameter in on_shapes.backbone.named_parameters() if id(parameter) in owned}
    private |= set(backbone.not_in_file)
    shared: dict[int, object] = {id(p): p for name, p in backbone.named_parameters() if name not in private}
    shared |= {id(buffer): buffer for buffer in cast(nn.Module, backbone).buffers()}
    return _loaded(adapter, copy.deepcopy(backbone, shared))


def _loaded(adapter: Adapter, backbone: Backbone) -> AdaptedModel:
    model = AdaptedModel(backbone, build_methods(adapter), adapter.config["num_classes"])
    model.load_adapter_state(adapter.state, str(adapter.folder / adapter.state_file))
    names = adapter.config.get("class_names")
    model.class_names = None if names is None else tuple(names)
    model.multi_label = adapter.config.get("multi_label", False)
    return model.eval()
