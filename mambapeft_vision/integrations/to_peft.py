"""Adapters of ours in the format of Hugging Face peft.

A model of peft's takes our tensors, computes the same logits as ours, and writes its files; so its versions may lay out
files as they like.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.integrations.peft_forms import FORMS, Form
from mambapeft_vision.integrations.same_logits import TOLERANCE, difference
from mambapeft_vision.methods.dora import ROWS, Decomposed, DoRA
from mambapeft_vision.methods.lora import LoRA, LowRank
from mambapeft_vision.methods.method import Method
from mambapeft_vision.utils.atomic import atomic_folder
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.tensor_files import system_errors
from mambapeft_vision.utils.text import plain

_AS_LORA = "`mambapeft export … --to lora` first makes a LoRA of it, and says how exact that is"


def to_peft(model: AdaptedModel, base: TimmModel, out: str | Path) -> float:
    """Writes an adapter in peft's format. Adapter and head load with `peft.PeftModel.from_pretrained(backbone, out)`.

    Args:
        model: the adapter, not merged.
        base: another backbone with the same weights; it is changed.
    Returns: the largest difference of logits, as a part of the largest logit.
    Raises: UserError for methods that peft lacks or defines in another way.
    """
    peft = _peft()
    kinds = {type(method) for method in model.methods.values()}
    config, tensors, shared = (_LOW_RANK.get(kinds.pop(), _by_form) if len(kinds) == 1 else _by_form)(model)
    base.reset_classifier(model.backbone.num_classes)
    base.head.load_state_dict(model.backbone.head.state_dict())
    kind, arguments = config
    paths = list(tensors)
    try:
        theirs = peft.get_peft_model(
            base, getattr(peft, kind)(target_modules=paths, modules_to_save=["head"], **arguments)
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"peft refuses the adapter: {plain(error)}; {_AS_LORA}") from None
    with torch.no_grad():
        for path, own in tensors.items():
            layer = theirs.base_model.model.get_submodule(path)
            _fill(path, dict(layer.named_parameters()), own)
            for name, value in shared.items():
                getattr(layer, name)["default"].copy_(value)
    found = difference(model.eval(), theirs.eval())
    if not found <= TOLERANCE:
        raise UserError(
            f"peft computes other logits with this adapter: they differ by {found:.1e} of the largest; {_AS_LORA}"
        )
    theirs.peft_config["default"].base_model_name_or_path = base.pretrained_cfg["architecture"]
    with atomic_folder(Path(out)) as temporary, system_errors(out):
        theirs.save_pretrained(str(temporary), save_embedding_layers=False)  # for them it would ask the hub
    return found


_Config = tuple[str, dict[str, Any]]
_Tensors = dict[str, dict[str, Tensor]]  # path of a module → name in peft → tensor


def _as_lora(model: AdaptedModel) -> tuple[_Config, _Tensors, dict[str, Tensor]]:
    """All LoRA methods of a model as one of peft's, whose scale is one: several on a weight lie side by side."""
    tensors = {path: _side_by_side(pairs, _weight(model, path)) for path, pairs in _pairs(model).items()}
    return ("LoraConfig", _sizes(tensors)), tensors, {}


def _as_dora(model: AdaptedModel) -> tuple[_Config, _Tensors, dict[str, Tensor]]:
    """All DoRA methods of a model as one of peft's. Rows of a weight that have none keep their norm and direction."""
    for method in cast(Mapping[str, DoRA], model.methods).values():
        if method.magnitudes != ROWS:
            raise UserError(
                f"{method.name}: its magnitudes are of input columns, as in MambaPEFT, and peft's are of output rows; "
                f"train with magnitudes: {ROWS}, or {_AS_LORA}"
            )
    tensors: _Tensors = {}
    for path, pairs in _pairs(model).items():
        weight = _weight(model, path)
        magnitude, taken = weight.flatten(1).norm(dim=1), torch.zeros(len(weight), dtype=torch.bool)
        tensors[path] = {**_side_by_side(pairs, weight), "lora_magnitude_vector.*.weight": magnitude}
        for pair, rows in pairs:
            place = slice(None) if rows is None else rows
            if taken[place].any():
                raise UserError(f"several DoRA methods change the same rows of {path}, and peft has one; {_AS_LORA}")
            taken[place], magnitude[place] = True, cast(Decomposed, pair).magnitude.detach().flatten()
    return ("LoraConfig", {**_sizes(tensors), "use_dora": True}), tensors, {}


#: Methods that peft has as its LoRA, whatever their sizes.
_LOW_RANK: dict[type[Method], Callable[[AdaptedModel], tuple[_Config, _Tensors, dict[str, Tensor]]]] = {
    LoRA: _as_lora,
    DoRA: _as_dora,
}
_Pairs = list[tuple[LowRank, slice | None]]


def _pairs(model: AdaptedModel) -> dict[str, _Pairs]:
    """The pairs of all methods and the rows that they are for, by the path of their module."""
    pairs: dict[str, _Pairs] = {}
    for method in cast(Mapping[str, LoRA | DoRA], model.methods).values():
        for parameter, found in method.pairs().items():
            pairs.setdefault(_module_of(model, parameter, method.name), []).append(found)
    return pairs


def _weight(model: AdaptedModel, path: str) -> Tensor:
    return model.backbone.get_submodule(path).get_parameter("weight").detach()


def _side_by_side(pairs: _Pairs, weight: Tensor) -> dict[str, Tensor]:
    several = [factors for pair, rows in pairs for factors in _factors(pair, rows, len(weight))]
    down, up = torch.cat([d for d, _ in several]), torch.cat([u for _, u in several], dim=1)
    return {"lora_A.*.weight": down, "lora_B.*.weight": up}


def _sizes(tensors: _Tensors) -> dict[str, Any]:
    """The arguments of peft's config for pairs of these ranks, with scale one."""
    ranks = {path: own["lora_A.*.weight"].shape[0] for path, own in tensors.items()}
    rank = max(ranks.values())
    others = {path: r for path, r in ranks.items() if r != rank}
    return {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)}


def _factors(pair: LowRank, rows: slice | None, out_features: int) -> list[tuple[Tensor, Tensor]]:
    """(down, scale · up) of a pair for the whole weight; with PiSSA also the first ones, which are taken away."""
    if pair.groups is not None:
        raise UserError(f"peft has no adapters of grouped weights [{pair.groups}, out, in], as VMamba's are")
    found: list[tuple[Tensor, Tensor]] = [(pair.down, pair.scale * pair.up)]
    if "first_down" in dict(pair.named_buffers()):
        found.append((pair.first_down, -pair.scale * pair.first_up))
    return [(down.detach(), _in_rows(up.detach(), rows, out_features)) for down, up in found]


def _in_rows(up: Tensor, rows: slice | None, out_features: int) -> Tensor:
    """`up` for all output rows: zeros where the method has none."""
    if rows is None:
        return up
    full = up.new_zeros(out_features, *up.shape[1:])
    full[rows] = up
    return full


def _by_form(model: AdaptedModel) -> tuple[_Config, _Tensors, dict[str, Tensor]]:
    """The methods of a model, which must be of one kind and have the same sizes, in peft's layout."""
    methods: list[Any] = list(model.methods.values())
    kinds = sorted({type(method).__name__ for method in methods})
    if len(kinds) != 1 or kinds[0] not in FORMS:
        listed, known = ", ".join(kinds) or "none", ", ".join(["LoRA", "DoRA", *FORMS])
        raise UserError(
            f"this adapter has methods of kind {listed}; peft's format holds one of {known}. For other methods of "
            f"weights {_AS_LORA}"
        )
    form = FORMS[kinds[0]]
    arguments = form.to_config(methods[0])
    tensors: _Tensors = {}
    scaled_inputs = []  # IA3's
    for method in methods:
        _check_form(method)
        if form.to_config(method) != arguments or (form.shared and len(methods) > 1):
            raise UserError(
                f"{method.name}: peft has one size for all modules, and its own random matrices; {_AS_LORA}"
            )
        for key, own in method.sites.items():
            path = _module_of(model, key.replace("/", "."), method.name)
            if path in tensors:
                raise UserError(f"{method.name}: peft adapts {path} once, but several methods do; {_AS_LORA}")
            if getattr(method, "side", "outputs") == "inputs":
                scaled_inputs.append(path)
            tensors[path] = {form.tensors[name]: _as_there(form, name, value.detach()) for name, value in own.items()}
    if kinds[0] == "IA3":
        arguments["feedforward_modules"] = scaled_inputs
    shared = {theirs: getattr(methods[0], ours) for ours, theirs in form.shared.items()}
    return (form.config, arguments), tensors, shared


def _as_there(form: Form, name: str, value: Tensor) -> Tensor:
    return value.mT if name in form.transposed else value


def _check_form(method: Any) -> None:
    """Raises UserError for options of a method that peft lacks."""
    if method.rows is not None:
        raise UserError(f"{method.name}: peft has no rows={method.rows!r}; {_AS_LORA}")
    if type(method).__name__ == "OFT" and method.neumann_terms is None:
        raise UserError(f"{method.name}: peft's exact inverse is that of another sign; {_AS_LORA}")


def _module_of(model: AdaptedModel, parameter: str, who: str) -> str:
    """The module of a weight that peft can wrap. Raises UserError for any other parameter."""
    path, _, attribute = parameter.rpartition(".")
    module = model.backbone.get_submodule(path)
    if attribute != "weight" or not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise UserError(f"{who}: peft adapts linear maps and convolutions, and {parameter} is neither; {_AS_LORA}")
    return path


def _fill(path: str, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, value in own.items():
        tensor = theirs.get(name.replace("*", "default"))
        if tensor is None or tensor.squeeze().shape != value.squeeze().shape:  # vectors have other axes of size 1 there
            other = "none of the name" if tensor is None else list(tensor.shape)
            raise UserError(f"{path}: {name} is {list(value.shape)}, but peft has {other}; {_AS_LORA}")
        tensor.copy_(value.reshape(tensor.shape))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("this needs Hugging Face peft; pip install 'mambapeft-vision[peft]'") from None
    return peft
