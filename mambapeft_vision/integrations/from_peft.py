"""Reads adapters that Hugging Face peft wrote.

Only tensors and sizes are read from a folder, and peft need not be installed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mambapeft_vision.adapter.files import CONFIG_FILE, Adapter, file_of_adapter, read_state
from mambapeft_vision.adapter.load import attach_adapter
from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.integrations.peft_forms import FORMS, PEFT_TENSOR_FILE, Form
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import read_json

MAX_CONFIG_BYTES = 1_000_000
_PREFIX = "base_model.model."

# Options of peft that change the meaning of its tensors: key → the values with which they mean the same as ours.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "block_share": (False, None),
    "use_cayley_neumann": (True, None),
    "use_effective_conv2d": (False, None),
    "decompose_factor": (-1, None),
    "decompose_both": (False, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "coft": (False, None),
    "apply_GS": (False, None),
    "init_weights": (True, False, None, "lycoris", "gaussian"),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
}
# But for LoRA:
_ONE_SIZE: dict[str, tuple[Any, ...]] = {
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "use_dora": (False, None),
}
_MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


def from_peft(folder: str | Path, backbone: TimmModel) -> AdaptedModel:
    """The model of an adapter that peft wrote: LoRA, DoRA or one of `FORMS`, and the head.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        backbone: with the weights that the adapter was trained on; it is changed.
    Raises: UserError for files that are no such adapter, for options that change what its tensors mean, and for tensors
        that are of none of its modules.
    """
    folder = Path(folder)
    config, state = _read(folder)
    head = {key: state.pop(key) for key in list(state) if key.startswith("head.")}
    if "head.weight" not in head:
        raise UserError(f"{folder / PEFT_TENSOR_FILE} holds no head; train it with modules_to_save=['head']")
    kind = config["peft_type"]
    form = next((name for name, form in FORMS.items() if form.config.lower() == f"{kind}config".lower()), None)
    if kind != "LORA" and form is None:
        known = ", ".join(["LoRA", *FORMS])
        raise UserError(f"{folder / CONFIG_FILE}: peft_type {shown(kind)}; expected one of {known}")
    try:
        if form is None:
            methods = _lora_methods(config, state, backbone)
        else:
            methods = _methods_of_form(form, config, state, backbone)
    except (KeyError, TypeError, ZeroDivisionError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{folder / CONFIG_FILE} does not fit its tensors ({plain(error)}); copy both again") from None
    ours = {
        "methods": {name: spec for name, (spec, _) in methods.items()},
        "num_classes": head["head.weight"].shape[0],
    }
    tensors = {f"{name}.{key}": tensor for name, (_, own) in methods.items() for key, tensor in own.items()}
    return attach_adapter(Adapter(folder, ours, {**tensors, **head}, PEFT_TENSOR_FILE), cast(Backbone, backbone))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, and the tensors by names without peft's prefix."""
    file = folder / CONFIG_FILE
    try:
        config = read_json(file_of_adapter(folder, CONFIG_FILE), max_bytes=MAX_CONFIG_BYTES)
    except OSError as error:
        raise UserError(f"{plain(error.filename)}: {error.strerror}; expected a folder that peft saved") from None
    if not (isinstance(config, dict) and isinstance(config.get("peft_type"), str)):
        raise UserError(f"{file} is no config of peft: it has no peft_type; expected a folder that peft saved")
    for key, allowed in {**_PLAIN, **({} if config["peft_type"] == "LORA" else _ONE_SIZE)}.items():
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
    tensors = read_state(file_of_adapter(folder, PEFT_TENSOR_FILE))
    for key, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.numel() == 0:
            raise UserError(
                f"{folder / PEFT_TENSOR_FILE}: {shown(key)} has shape {tuple(tensor.shape)}; expected elements and at "
                "least one axis. Copy it again"
            )
    return config, {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


_Methods = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]  # name → spec, tensors by their saved names


_LORA: dict[str, Any] = {
    "_target_": "mambapeft_vision.methods.lora.LoRA",
    "space": "weight",  # weights inside of mixers have no port on activations
}
_DORA: dict[str, Any] = {"_target_": "mambapeft_vision.methods.dora.DoRA", "magnitudes": "rows"}


def _lora_methods(config: Mapping[str, Any], state: Mapping[str, Tensor], backbone: TimmModel) -> _Methods:
    """One method of ours for each pair of rank and scale: LoRA, or DoRA with magnitudes of output rows."""
    methods: _Methods = {}
    kind, spec_of = "lora", _LORA
    names: tuple[str, ...] = ("lora_A.weight", "lora_B.weight")
    if config.get("use_dora"):
        kind, spec_of, names = "dora", _DORA, (*names, "lora_magnitude_vector")
    alphas = _by_name(config.get("alpha_pattern") or {})
    for path, own in _by_module(state, names, backbone).items():
        down, up = own["lora_A.weight"], own["lora_B.weight"]
        rank = down.shape[0]
        called = _names_of(path)
        alpha = next((value for name, value in alphas.items() if name in called), config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        name = f"{kind}_r{rank}_s{scale:.6g}".replace(".", "_").replace("-", "m").replace("+", "p")
        spec, tensors = methods.setdefault(name, ({**spec_of, "targets": [], "rank": rank, "scale": scale}, {}))
        spec["targets"].append(f"{path}.weight")
        tensors[f"{path}.weight.down"], tensors[f"{path}.weight.up"] = down, up
        if kind == "dora":
            magnitude = own["lora_magnitude_vector"]
            tensors[f"{path}.weight.magnitude"] = magnitude.reshape(-1, *[1] * (down.ndim - 1))
    return methods if len(methods) > 1 else dict(zip([kind], methods.values()))


def _methods_of_form(kind: str, config: Mapping[str, Any], state: dict[str, Tensor], backbone: TimmModel) -> _Methods:
    form = FORMS[kind]
    saved = {name: theirs.replace(".*", "") for name, theirs in form.tensors.items()}
    shared = _taken_shared(form, state)
    of_inputs = _by_name(config.get("feedforward_modules") or {})  # IA3's
    methods: _Methods = {}
    for path, own in _by_module(state, tuple(saved.values()), backbone).items():
        side, name = {}, kind.lower()
        if kind == "IA3":
            side = {"side": "outputs" if of_inputs.keys().isdisjoint(_names_of(path)) else "inputs"}
            name = f"ia3_{side['side']}"
        target = f"mambapeft_vision.methods.{kind.lower()}.{kind}"
        spec, tensors = methods.setdefault(
            name, ({"_target_": target, "targets": [], **form.from_config(config), **side}, dict(shared))
        )
        spec["targets"].append(f"{path}.weight")
        for ours, theirs in saved.items():
            if theirs in own:
                tensors[f"{path}.weight.{ours}"] = _as_here(form, ours, own[theirs])
    return methods


def _as_here(form: Form, name: str, value: Tensor) -> Tensor:
    if name in form.vectors:
        return value.flatten()
    return value.mT if name in form.transposed else value


def _taken_shared(form: Form, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that belong to no module, such as VeRA's random matrices."""
    names = {ours: f"base_model.{theirs}" for ours, theirs in form.shared.items()}
    if not state.keys() >= set(names.values()):
        missing = " and ".join(form.shared.values())
        raise UserError(f"the file holds no {missing}; save the adapter in peft with save_projection=True")
    return {ours: state.pop(theirs) for ours, theirs in names.items()}


def _by_name(patterns: Any) -> dict[str, Any]:
    """Values by the names of modules that a config of peft has, or just the names. Raises UserError for patterns."""
    is_text = isinstance(patterns, str)  # one regular expression to peft, whatever it is
    values: dict[str, Any] = (
        patterns if isinstance(patterns, dict) else dict.fromkeys([patterns] if is_text else patterns)
    )
    for key in values:
        if is_text or not re.fullmatch(r"[\w.\\]+", key):
            raise UserError(f"{shown(key)} in {CONFIG_FILE} is a regular expression; expected names of modules")
    return {key.replace("\\", ""): value for key, value in values.items()}


def _names_of(path: str) -> set[str]:
    """The names that a config of peft can use for a module: its path, or the last parts of it."""
    parts = path.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _by_module(state: Mapping[str, Tensor], names: Sequence[str], backbone: TimmModel) -> dict[str, dict[str, Tensor]]:
    """The tensors by module and name. Raises UserError for another name, and AttributeError for another module."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = next((name for name in names if key.endswith(f".{name}")), None)
        if name is None:
            raise UserError(
                f"{PEFT_TENSOR_FILE} holds {shown(key)}; expected {', '.join(names)} of modules, and the head"
            )
        path = key.removesuffix(f".{name}")
        backbone.get_submodule(path)
        modules.setdefault(path, {})[name] = tensor
    return modules
