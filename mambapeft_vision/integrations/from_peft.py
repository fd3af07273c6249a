"""Adapters that Hugging Face peft wrote, as ours.

Nothing but tensors and sizes is taken from a folder, and peft need not be installed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.files import CONFIG_FILE
from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.integrations.peft_forms import FORMS, PEFT_TENSOR_FILE, column
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.tensor_files import read_tensors
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import read_json

_MAX_CONFIG_BYTES = 1_000_000
_PREFIX = "base_model.model."

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
        raise UserError(f"{folder / PEFT_TENSOR_FILE} holds no head; train it with modules_to_save=['head']")
    kind = config["peft_type"]
    form = next((name for name, form in FORMS.items() if form.config.lower() == f"{kind}config".lower()), None)
    if kind != "LORA" and form is None:
        known = ", ".join(["LoRA", *FORMS])
        raise UserError(f"{folder / CONFIG_FILE}: peft_type {shown(kind)}; expected one of {known}")
    try:
        methods = _lora_methods(config, state) if form is None else _methods_of_form(form, config, state)
    except (KeyError, TypeError, ZeroDivisionError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{folder / CONFIG_FILE} does not fit its tensors ({plain(error)}); copy both again") from None
    built = {name: build_method(name, spec, str(folder / CONFIG_FILE)) for name, (spec, _) in methods.items()}
    model = adapt(cast(Backbone, backbone), built, head["weight"].shape[0])
    tensors = {f"{name}.{key}": tensor for name, (_, own) in methods.items() for key, tensor in own.items()}
    mine = model.adapter_state()
    given = {**tensors, **{f"head.{key}": value for key, value in head.items()}}
    shaped = {
        key: value.reshape(mine[key].shape) if _fits(mine.get(key), value) else value for key, value in given.items()
    }
    model.load_adapter_state(shaped, str(folder / PEFT_TENSOR_FILE))
    return model.eval()


def _fits(mine: Tensor | None, value: Tensor) -> bool:
    """Whether a tensor of theirs is one of ours, up to axes of size 1."""
    return mine is not None and mine.squeeze().shape == value.squeeze().shape


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, and the tensors by names without peft's prefix."""
    file = folder / CONFIG_FILE
    try:
        config = read_json(file, max_bytes=_MAX_CONFIG_BYTES)
        tensors = read_tensors(folder / PEFT_TENSOR_FILE)
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
        raise UserError(f"{folder / PEFT_TENSOR_FILE} holds no tensors; expected a folder that peft saved")
    for key, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.numel() == 0:  # such a shape takes no bytes and asks for any memory
            raise UserError(
                f"{folder / PEFT_TENSOR_FILE}: {shown(key)} has shape {tuple(tensor.shape)}; expected elements and at "
                "least one axis. Copy it again"
            )
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
    return methods if len(methods) > 1 else dict(zip(["lora"], methods.values()))


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
                tensors[f"{path}.weight.{ours}"] = own[theirs] if lie is column else lie(own[theirs]).contiguous()
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
            raise UserError(
                f"{PEFT_TENSOR_FILE} holds {shown(key)}; expected {', '.join(names)} of modules, and the head"
            )
        modules.setdefault(key.removesuffix(f".{name}"), {})[name] = tensor
    return modules
