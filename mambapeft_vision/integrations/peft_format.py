"""Adapters in the format of Hugging Face peft, both ways.

peft's own models take our tensors, compute the same logits as ours, and write their files; so its versions may lay out
files as they like. Reading takes nothing but tensors and sizes from a folder, and needs no peft.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.files import CONFIG_FILE
from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.integrations.program import TOLERANCE, images
from mambapeft_vision.methods.lora import LoRA, LowRank
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.tensor_files import read_tensors
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import read_json

TENSOR_FILE = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1_000_000
_PREFIX = "base_model.model."
_AS_LORA = "`mambapeft export … --to lora` first makes a LoRA of it, and says how exact that is"


@dataclass(frozen=True)
class Form:
    """How a method of ours is called in peft.

    config: the class of its config there.
    arguments: of that config, from our method.
    ours: the arguments of our method, from that config.
    names: our tensor → its name in peft, and how it lies there.
    """

    config: str
    arguments: Callable[[Any], dict[str, Any]]
    ours: Callable[[Mapping[str, Any]], dict[str, Any]]
    names: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT


def _column(tensor: Tensor) -> Tensor:
    return tensor[:, None]


#: Our class → its form. Tensors are named as peft's modules have them; "*" stands for the adapter's name there.
FORMS: dict[str, Form] = {
    "VeRA": Form(
        "VeraConfig",
        lambda m: {"r": m.rank, "d_initial": m.d_initial},
        lambda c: {"rank": c["r"], "d_initial": c.get("d_initial", 0.1)},
        {"d": ("vera_lambda_d.*", _same), "b": ("vera_lambda_b.*", _same)},
    ),
    "LoHa": Form(
        "LoHaConfig",
        lambda m: {"r": m.rank, "alpha": m.scale * m.rank},
        lambda c: {"rank": c["r"], "scale": c["alpha"] / c["r"]},
        {
            "up_1": ("hada_w1_a.*", _same),
            "down_1": ("hada_w1_b.*", _same),
            "up_2": ("hada_w2_a.*", _same),
            "down_2": ("hada_w2_b.*", _same),
        },
    ),
    "LoKr": Form(
        "LoKrConfig",
        lambda m: {"r": m.rank, "alpha": m.scale * m.rank},
        lambda c: {"rank": c["r"], "scale": c["alpha"] / c["r"]},
        {
            "first": ("lokr_w1.*", _same),
            "second": ("lokr_w2.*", _same),
            "up": ("lokr_w2_a.*", _same),
            "down": ("lokr_w2_b.*", _same),
        },
    ),
    "MiSS": Form(
        "MissConfig", lambda m: {"r": m.rank}, lambda c: {"rank": c["r"]}, {"block": ("miss_block.*", _transposed)}
    ),
    "HiRA": Form(
        "HiraConfig",
        lambda m: {"r": m.rank},
        lambda c: {"rank": c["r"]},
        {"down": ("hira_A.*", _same), "up": ("hira_B.*", _same)},
    ),
    "HRA": Form("HRAConfig", lambda m: {"r": m.rank}, lambda c: {"rank": c["r"]}, {"u": ("hra_u.*", _transposed)}),
    "OFT": Form(
        "OFTConfig",
        lambda m: {
            "r": 0,
            "oft_block_size": m.block_size,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": m.neumann_terms,
        },
        lambda c: {"block_size": c["oft_block_size"], "neumann_terms": c.get("num_cayley_neumann_terms", 5)},
        {"skew": ("oft_R.*.weight", _same)},
    ),
    "BOFT": Form(
        "BOFTConfig",
        lambda m: {"boft_block_size": m.block_size, "boft_n_butterfly_factor": m.factors},
        lambda c: {"block_size": c["boft_block_size"], "factors": c["boft_n_butterfly_factor"]},
        {"blocks": ("boft_R.*", _same), "scale": ("boft_s.*", _column)},
    ),
    "IA3": Form("IA3Config", lambda m: {}, lambda c: {}, {"scale": ("ia3_l.*", _column)}),
}

# Options of peft with which its tensors mean something else than ours: key → the values that leave them as they are.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "oft_block_share": (False, None),
    "use_cayley_neumann": (True, None),
    "use_effective_conv2d": (False, None),
    "decompose_factor": (-1, None),
    "decompose_both": (False, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "coft": (False, None),
    "r_pattern": ({}, None),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
}
_MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


# -- ours → peft ------------------------------------------------------------------------------------------------


def to_peft(model: AdaptedModel, base: TimmModel, out: str | Path) -> float:
    """Writes an adapter in peft's format. Adapter and head load with `peft.PeftModel.from_pretrained(backbone, out)`.

    Args:
        model: the adapter, not merged.
        base: another backbone with the same weights; it is changed.
    Returns: the largest difference of logits, as a part of the largest logit.
    Raises: UserError for methods that peft has not, or has otherwise.
    """
    peft = _peft()
    config, tensors, shared = _as_lora(model) if _only_lora(model) else _by_form(model)
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
    difference = _difference(model, theirs.eval())
    if not difference <= TOLERANCE:
        raise UserError(
            f"peft computes other logits with this adapter: they differ by {difference:.1e} of the largest; {_AS_LORA}"
        )
    theirs.peft_config["default"].base_model_name_or_path = base.pretrained_cfg["architecture"]
    theirs.save_pretrained(str(out))
    return difference


_Config = tuple[str, dict[str, Any]]
_Tensors = dict[str, dict[str, Tensor]]  # path of a module → name in peft → tensor


def _only_lora(model: AdaptedModel) -> bool:
    return bool(model.methods) and all(type(method) is LoRA for method in model.methods.values())


def _as_lora(model: AdaptedModel) -> tuple[_Config, _Tensors, dict[str, Tensor]]:
    """All LoRA methods of a model as one of peft's, whose scale is one: several on a weight lie side by side."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for method in cast(Mapping[str, LoRA], model.methods).values():
        for parameter, (pair, rows) in method.pairs().items():
            path = _module_of(model, parameter, method.name)
            full = model.backbone.get_submodule(path).get_parameter("weight")
            pairs.setdefault(path, []).extend(_factors(pair, rows, full.shape[0]))
    tensors: _Tensors = {}
    for path, several in pairs.items():
        down, up = torch.cat([d for d, _ in several]), torch.cat([u for _, u in several], dim=1)
        tensors[path] = {"lora_A.*.weight": down, "lora_B.*.weight": up}
    ranks = {path: own["lora_A.*.weight"].shape[0] for path, own in tensors.items()}
    rank = max(ranks.values())
    others = {path: r for path, r in ranks.items() if r != rank}
    arguments = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)}
    return ("LoraConfig", arguments), tensors, {}


def _factors(pair: LowRank, rows: slice | None, out_features: int) -> list[tuple[Tensor, Tensor]]:
    """(down, scale · up) of a pair for the whole weight; with PiSSA also the first ones, which are taken away."""
    if pair.groups is not None:
        raise UserError(f"peft has no adapters of grouped weights [{pair.groups}, out, in], as VMamba's are")
    found = [(pair.down, pair.scale * pair.up)]
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
    """The methods of a model, which are of one kind and have the same sizes, as peft has them."""
    methods: list[Any] = list(model.methods.values())
    kinds = sorted({type(method).__name__ for method in methods})
    if len(kinds) != 1 or kinds[0] not in FORMS:
        listed, known = ", ".join(kinds) or "none", ", ".join(["LoRA", *FORMS])
        raise UserError(
            f"this adapter has methods of kind {listed}; peft's format holds one of {known}. For other methods of "
            f"weights {_AS_LORA}"
        )
    form = FORMS[kinds[0]]
    arguments = form.arguments(methods[0])
    tensors: _Tensors = {}
    scaled_inputs = []  # IA3's
    for method in methods:
        _check_form(method)
        if form.arguments(method) != arguments or (kinds[0] == "VeRA" and len(methods) > 1):
            raise UserError(
                f"{method.name}: peft has one size for all modules, and its own random matrices; {_AS_LORA}"
            )
        inputs = getattr(method, "side", "outputs") == "inputs"
        for key, own in method.sites.items():
            path = _module_of(model, key.replace("/", "."), method.name)
            if path in tensors:
                raise UserError(f"{method.name}: peft adapts {path} once, but several methods do; {_AS_LORA}")
            scaled_inputs += [path] * inputs
            tensors[path] = {
                form.names[name][0]: value.detach()[None] if inputs else form.names[name][1](value.detach())
                for name, value in own.items()
            }
    if kinds[0] == "IA3":
        arguments["feedforward_modules"] = scaled_inputs
    shared = {"vera_A": methods[0].random_down, "vera_B": methods[0].random_up} if kinds[0] == "VeRA" else {}
    return (form.config, arguments), tensors, shared


def _check_form(method: Any) -> None:
    """Raises UserError for options of a method that peft has not."""
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
        if tensor is None or tensor.shape != value.shape:
            other = "none of the name" if tensor is None else list(tensor.shape)
            raise UserError(f"{path}: {name} is {list(value.shape)}, but peft has {other}; {_AS_LORA}")
        tensor.copy_(value)


@torch.no_grad()
def _difference(model: AdaptedModel, theirs: nn.Module) -> float:
    mine = model.eval()(images(model, 2))
    return float((theirs(images(model, 2)) - mine).abs().max() / mine.abs().max().clamp_min(1e-12))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("this needs Hugging Face peft; pip install 'mambapeft-vision[peft]'") from None
    return peft


# -- peft → ours ------------------------------------------------------------------------------------------------


def from_peft(folder: str | Path, backbone: TimmModel) -> AdaptedModel:
    """The model of an adapter that peft wrote: LoRA, or one of `FORMS`, and the head.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        backbone: with the weights that the adapter was trained on; it is changed.
    Raises: UserError for files that are no such adapter, for options that change what its tensors mean, and for tensors
        that are of none of its modules.
    """
    folder = Path(folder)
    config, state = _read(folder)
    head = {key.removeprefix("head."): state.pop(key) for key in list(state) if key.startswith("head.")}
    if "weight" not in head:
        raise UserError(f"{folder / TENSOR_FILE} holds no head; train it with modules_to_save=['head']")
    kind = config["peft_type"]
    form = next((name for name, form in FORMS.items() if form.config.lower() == f"{kind}config".lower()), None)
    if kind != "LORA" and form is None:
        known = ", ".join(["LoRA", *FORMS])
        raise UserError(f"{folder / CONFIG_FILE}: peft_type {shown(kind)}; expected one of {known}")
    try:
        methods = _lora_methods(config, state) if form is None else _methods_of_form(form, config, state)
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG_FILE} does not fit its tensors ({plain(error)}); copy both again") from None
    built = {name: build_method(name, spec, str(folder / CONFIG_FILE)) for name, (spec, _) in methods.items()}
    model = adapt(backbone, built, head["weight"].shape[0])
    tensors = {f"{name}.{key}": tensor for name, (_, own) in methods.items() for key, tensor in own.items()}
    mine = model.adapter_state()
    given = {**tensors, **{f"head.{key}": value for key, value in head.items()}}
    shaped = {
        key: value.reshape(mine[key].shape) if _fits(mine.get(key), value) else value for key, value in given.items()
    }
    model.load_adapter_state(shaped, str(folder / TENSOR_FILE))
    return model.eval()


def _fits(mine: Tensor | None, value: Tensor) -> bool:
    """Whether a tensor of theirs is one of ours, up to axes of size 1."""
    return mine is not None and mine.squeeze().shape == value.squeeze().shape


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, and the tensors by names without peft's prefix."""
    file = folder / CONFIG_FILE
    try:
        config = read_json(file, max_bytes=_MAX_CONFIG_BYTES)
        tensors = read_tensors(folder / TENSOR_FILE)
    except OSError as error:
        raise UserError(f"{plain(error.filename)}: {error.strerror}; expected a folder that peft saved") from None
    if not (isinstance(config, dict) and isinstance(config.get("peft_type"), str)):
        raise UserError(f"{file} is no config of peft: it has no peft_type; expected a folder that peft saved")
    for key, allowed in _PLAIN.items():
        if config.get(key) not in allowed:
            raise UserError(
                f"{file}: {key}={shown(config[key])}, which changes what its tensors mean here; merge in peft"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_MOVES_WEIGHTS):
        raise UserError(
            f"{file}: init_lora_weights={shown(start)} changes the backbone's weights too; save it in peft with "
            f"path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it"
        )
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{folder / TENSOR_FILE} holds no tensors; expected a folder that peft saved")
    return config, {str(key).removeprefix(_PREFIX): tensor.float() for key, tensor in tensors.items()}


_Methods = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]  # name → spec, tensors by their saved names


def _lora_methods(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> _Methods:
    """One method of ours for each pair of rank and scale."""
    methods: _Methods = {}
    for path, own in _by_module(state, ("lora_A.weight", "lora_B.weight")).items():
        down, up = own["lora_A.weight"], own["lora_B.weight"]
        rank = down.shape[0]
        alpha = _of_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        name = f"lora_r{rank}_s{scale:.6g}".replace(".", "_").replace("-", "m").replace("+", "p")
        spec, tensors = methods.setdefault(
            name,
            (
                {
                    "_target_": "mambapeft_vision.methods.lora.LoRA",
                    "targets": [],
                    "rank": rank,
                    "scale": scale,
                    "space": "weight",  # weights inside of mixers have no port on activations
                },
                {},
            ),
        )
        spec["targets"].append(f"{path}.weight")
        tensors[f"{path}.weight.down"], tensors[f"{path}.weight.up"] = down, up
    return methods if len(methods) > 1 else {"lora": method for method in methods.values()}


def _of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that means a module."""
    return next((value for key, value in patterns.items() if _is_meant(path, [key])), default)


def _is_meant(path: str, names: Sequence[str]) -> bool:
    """Whether a module is one of those that peft's config names."""
    for key in names:
        if not re.fullmatch(r"[\w.\\]+", key):
            raise UserError(f"{shown(key)} in {CONFIG_FILE} is a regular expression; expected names of modules")
        name = key.replace("\\", "")
        if path == name or path.endswith(f".{name}"):
            return True
    return False


def _methods_of_form(kind: str, config: Mapping[str, Any], state: dict[str, Tensor]) -> _Methods:
    form = FORMS[kind]
    saved = {name: theirs.replace(".*", "") for name, (theirs, _) in form.names.items()}
    shared = _taken_random_matrices(state) if kind == "VeRA" else {}
    methods: _Methods = {}
    for path, own in _by_module(state, tuple(saved.values())).items():
        side, name = {}, kind.lower()
        if kind == "IA3":
            inputs = _is_meant(path, config.get("feedforward_modules") or [])
            side, name = {"side": "inputs" if inputs else "outputs"}, f"ia3_{'inputs' if inputs else 'outputs'}"
        target = f"mambapeft_vision.methods.{kind.lower()}.{kind}"
        spec, tensors = methods.setdefault(
            name, ({"_target_": target, "targets": [], **form.ours(config), **side}, dict(shared))
        )
        spec["targets"].append(f"{path}.weight")
        for ours, theirs in saved.items():
            if theirs in own:
                lie = form.names[ours][1]  # its own inverse, up to axes of size 1
                tensors[f"{path}.weight.{ours}"] = own[theirs] if lie is _column else lie(own[theirs]).contiguous()
    return methods


def _taken_random_matrices(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """VeRA's, which are no module's."""
    names = {"random_down": "base_model.vera_A", "random_up": "base_model.vera_B"}
    if not state.keys() >= set(names.values()):
        raise UserError("the file holds no vera_A and vera_B; save the adapter in peft with save_projection=True")
    return {ours: state.pop(theirs) for ours, theirs in names.items()}


def _by_module(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors by module and name. Raises UserError for one that is of no such name."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = next((name for name in names if key.endswith(f".{name}")), None)
        if name is None:
            raise UserError(f"{TENSOR_FILE} holds {shown(key)}; expected {', '.join(names)} of modules, and the head")
        modules.setdefault(key.removesuffix(f".{name}"), {})[name] = tensor
    return modules
