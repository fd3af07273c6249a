"""Models of the published code of SVP (zhoujiahuan1991/AAAI2025-SVP): its arguments and names in ours."""

from collections.abc import Mapping
from typing import Any

from mambapeft_vision.methods.svp import SVP
from mambapeft_vision.utils.errors import UserError

_DEFAULTS: dict[str, Any] = {
    "transfer_type": "prompt",
    "prompt_type": "addv4",
    "prompt_add_gen": "mlp384*384",
    "prompt_dropout": 0.0,
    "shared_layers": 1,
    "dataset": None,
    "input_relu": False,
}
_IGNORED = ("prompt_shared", "prompt_depth")  # without effect there
_SCALE_ROWS = 24
_TWO_LAYER_HEADS = ("CUB200", "NABIRDS", "FLOWERS")  # data sets
# Ours → the reference's, for the tensors that are no map's.
_SCALES = {"inner_scale": "prompt_scale", "cross_scale": "prompt_shared_scale"}


def svp_arguments(module_kwargs: Mapping[str, Any], bugs: bool) -> tuple[dict[str, Any], SVP]:
    """From the arguments of its `VisionMamba` those of a plain Vim, and our method.

    bugs: take the second half's cross prompts from the first half, as the published code does.
    Raises: UserError for forms that the published code cannot run.
    """
    vim = {k: v for k, v in module_kwargs.items() if k not in _DEFAULTS and k not in _IGNORED}
    vim |= {"if_cls_token": True, "use_middle_cls_token": True}  # its code has no other form
    own = {k: module_kwargs.get(k, default) for k, default in _DEFAULTS.items()}
    for key in ("transfer_type", "prompt_type"):
        if own[key] != _DEFAULTS[key]:
            raise UserError(
                f"module_kwargs: {key}={own[key]!r}; only {_DEFAULTS[key]!r} is SVP. For a plain Vim leave family out"
            )
    if own["prompt_add_gen"] == "mlp384*32":
        raise UserError("module_kwargs: prompt_add_gen='mlp384*32' does not run in the reference: its sizes do not fit")
    depth, shared = vim.get("depth", 24), own["shared_layers"]
    if depth > _SCALE_ROWS or not isinstance(shared, int) or shared < 1 or depth % shared:
        raise UserError(
            f"module_kwargs: depth={depth!r} and shared_layers={shared!r} do not run in the reference; expected a "
            f"depth of at most {_SCALE_ROWS} that shared_layers divides"
        )
    method = SVP(
        rank=128 if own["prompt_add_gen"] == "mlp384*128" else 64,  # any other name means 64 there
        shared_layers=shared,
        cross="first_half" if bugs else "own",
        dropout=own["prompt_dropout"],
        image_attention=bool(own["input_relu"]),
        head_hidden=vim.get("embed_dim", 192) // 2 if own["dataset"] in _TWO_LAYER_HEADS else None,
        scale_rows=_SCALE_ROWS,
    )
    return vim, method


def svp_name(own: str) -> str:
    """inner_prompts.3.1.weight → prompt_generator.3.1.weight, cross_prompts.0.weight → prompt_generator_shared.0.0.…"""
    if own in _SCALES:
        return _SCALES[own]
    kind, index, rest = own.split(".", 2)
    return (
        f"prompt_generator.{index}.{rest}" if kind == "inner_prompts" else f"prompt_generator_shared.{index}.0.{rest}"
    )
