"""Arguments of MambaPEFT's VMamba code (`VSSM`, `VSSMPEFTModel`), as sizes and methods of ours.

Forms that crash there, or do not do what their names say, are refused with the reason.
"""

from collections.abc import Mapping
from typing import Any

from mambapeft_vision.integrations.reference_parts import GENERATOR, Part
from mambapeft_vision.methods.additional_scan import AdditionalScan
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.offset import Offset
from mambapeft_vision.methods.parallel_adapter import ParallelAdapter
from mambapeft_vision.methods.unfreeze import Unfreeze
from mambapeft_vision.utils.errors import UserError

# Argument of its VSSM → the default there.
_DEFAULTS: dict[str, Any] = {
    "patch_size": 4,
    "in_chans": 3,
    "depths": (2, 2, 9, 2),
    "dims": (96, 192, 384, 768),
    "ssm_d_state": 16,
    "ssm_ratio": 2.0,
    "ssm_dt_rank": "auto",
    "ssm_act_layer": "silu",
    "ssm_conv": 3,
    "ssm_conv_bias": True,
    "ssm_drop_rate": 0.0,
    "forward_type": "v2",
    "mlp_ratio": 4.0,
    "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0,
    "gmlp": False,
    "drop_path_rate": 0.1,
    "patch_norm": True,
    "norm_layer": "LN",
    "downsample_version": "v2",
    "patchembed_version": "v1",
    "posembed": False,
    "imgsize": 224,
}
# Without effect on what is computed.
_IGNORED = {"type", "num_classes", "ssm_init", "use_checkpoint", "out_indices", "pretrained", "init_cfg"}
# Values that both layouts must have, and values of each.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "ssm_act_layer": ("silu",),
    "ssm_conv": (3,),
    "ssm_drop_rate": (0.0,),
    "mlp_act_layer": ("gelu",),
    "mlp_drop_rate": (0.0,),
    "gmlp": (False,),
    "patch_norm": (True,),
    "posembed": (False,),
    "forward_type": ("v05_noz", "v0"),
}
_LAYOUTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "v05_noz": {"downsample_version": ("v3",), "patchembed_version": ("v2",), "norm_layer": ("ln2d", "ln")},
    "v0": {"downsample_version": ("v1",), "patchembed_version": ("v1",), "norm_layer": ("ln",)},
}


def backbone_of(module_kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered name and the sizes of our backbone that computes the same as its arguments."""
    given = {name: value for name, value in module_kwargs.items() if name not in _IGNORED}
    unknown = sorted(set(given) - set(_DEFAULTS))
    if unknown:
        raise UserError(
            f"module_kwargs: VMamba's code has no argument {', '.join(unknown)}; known: {', '.join(sorted(_DEFAULTS))}"
        )
    values = {**_DEFAULTS, **given}
    values["norm_layer"] = str(values["norm_layer"]).lower()
    _require(values, _REQUIRED, "")
    _require(values, _LAYOUTS[values["forward_type"]], f" with forward_type={values['forward_type']!r}")
    dims = values["dims"]
    sizes = {
        "img_size": values["imgsize"],
        "patch_size": values["patch_size"],
        "in_chans": values["in_chans"],
        "dims": dims if isinstance(dims, int) else tuple(dims),
        "depths": tuple(values["depths"]),
        "d_state": values["ssm_d_state"],
        "ssm_ratio": float(values["ssm_ratio"]),
        "mlp_ratio": float(values["mlp_ratio"]),
        "drop_path_rate": float(values["drop_path_rate"]),
        "conv_bias": values["ssm_conv_bias"],
    }
    if values["ssm_dt_rank"] != "auto":
        sizes["dt_rank"] = values["ssm_dt_rank"]
    return "vmamba_vanilla_tiny" if values["forward_type"] == "v0" else "vmamba_tiny_s1l8", sizes


def _require(values: Mapping[str, Any], required: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, supported in required.items():
        if values[name] not in supported:
            known = " or ".join(map(repr, supported))
            raise UserError(f"module_kwargs: {name}={values[name]!r}; supported{where}: {known}")


# Its switch → (our name of the method, role, rows).
_LORA: dict[str, tuple[str, str, str | None]] = {
    "in_proj": ("lora_in_proj", "in_proj", None),
    "out_proj": ("lora_out_proj", "out_proj", None),
    "x_proj": ("lora_x_proj", "x_proj", None),
    "d": ("lora_p_d", "x_proj", "d"),
    "B": ("lora_p_b", "x_proj", "b"),
    "C": ("lora_p_c", "x_proj", "c"),
    "dt": ("lora_dt_proj", "dt_proj", None),
}
_IN_ACTIVATIONS = ("in_proj", "out_proj")
# Its switch → our role, and its name of the offset.
_OFFSETS = {
    "A": ("A_log", "learnable_A_logs"),
    "D": ("D", "learnable_D"),
    "conv1d": ("conv", "learnable_conv1d_weight"),
    "bias": ("dt_bias", "learnable_bias"),
}
_DEAD = (
    "creates parameters that take part in nothing (VMamba's blocks have no gate, so in_proj has no such half); the "
    "correct form is lora_in_proj"
)
_REFUSED = {
    "lora_X": _DEAD,
    "lora_Z": _DEAD,
    "lora_patch_embed": "is accepted there and does nothing (no parameters)",
    "prompt_tuning": "is refused there: VMamba's maps have no room for prompts",
    "learnable_cls_token": "is refused there: VMamba has no class token",
    "learnable_pos_embed": "is refused there: VMamba has no position embedding",
    "use_dora": "is not implemented there for VMamba; ours is DoRA(targets=…)",
}


def parts_of(kwargs: Mapping[str, Any], module_kwargs: Mapping[str, Any], bugs: bool) -> list[Part]:
    """Our methods for its PEFT arguments.

    kwargs: with their defaults. bugs: also forms whose behaviour is not what their name says.
    """
    for switch in (*_REFUSED, "learnable_cls_token_v2", "learnable_pos_embed_v2"):
        if kwargs[switch]:
            raise UserError(f"{switch}={kwargs[switch]!r} of the reference {_REFUSED[switch.removesuffix('_v2')]}")
    if str(module_kwargs.get("forward_type")) != "v05_noz":
        raise UserError(
            f"module_kwargs: forward_type={module_kwargs.get('forward_type', 'v2')!r}: the reference's methods run on "
            f"'v05_noz' alone (they crash on 'v0' and change the scans of others); give peft_kwargs=None or 'v05_noz'"
        )
    _refuse_channel_last_adapters(kwargs, module_kwargs)
    parts = [_lora(kwargs, key) for key in _LORA if kwargs[f"lora_{key}"]]
    conv_bias = module_kwargs.get("ssm_conv_bias", _DEFAULTS["ssm_conv_bias"])
    parts += [_learnable(kwargs, key, conv_bias) for key in _OFFSETS if kwargs[f"learnable_{key}"]]
    if kwargs["adaptformer"]:
        parts.append(_adapter(kwargs))
    if kwargs["prefix_tuning"]:
        parts.append(_affix(kwargs))
    if kwargs["additional_scan"]:
        parts.append(_additional_scan(kwargs, bugs))
    return parts


def _refuse_channel_last_adapters(kwargs: Mapping[str, Any], module_kwargs: Mapping[str, Any]) -> None:
    switches = [switch for switch in ("lora_in_proj", "lora_out_proj", "adaptformer") if kwargs[switch]]
    if switches and str(module_kwargs.get("norm_layer", "LN")).lower() == "ln":
        raise UserError(
            f"{', '.join(switches)} with module_kwargs norm_layer='ln': the reference's adapters of activations are "
            f"wrong on maps whose channels stand last (they take the width for channels); give norm_layer='ln2d', the "
            f"same function"
        )


def _lora(kwargs: Mapping[str, Any], key: str) -> Part:
    name, role, rows = _LORA[key]
    suffix = "" if key == "out_proj" else f"_{key}"  # the reference's `dim` and `s` are those of out_proj
    sizes: dict[str, Any] = {"targets": role, "rank": kwargs[f"dim{suffix}"], "scale": kwargs[f"s{suffix}"]}
    if key in _IN_ACTIVATIONS:
        method, ending = LoRA(**sizes, dropout=0.1), ".weight"
    else:
        method, ending = LoRA(**sizes, rows=rows, space="weight"), "_weight"

    def rename(own: str) -> str:
        # layers.0.blocks.0.op.x_proj_weight.down → layers.0.blocks.0.op.lora_B.adapter_down_weight
        return f"{_op(own)}.lora_{key}.adapter_{own.rpartition('.')[2]}{ending}"

    trained = kwargs[f"train_lora_{key}"] or (key == "dt" and kwargs["train_lora_d"])
    return Part(name, method, rename, trained)


def _learnable(kwargs: Mapping[str, Any], key: str, conv_bias: bool) -> Part:
    role, name = _OFFSETS[key]
    trained = kwargs[f"train_{key}"]
    if kwargs[f"learnable_{key}_v2"]:
        return Part(f"offset_{key}", Offset(targets=role), lambda own: f"{_op(own)}.{name}", trained)
    targets = [role, "layers.*.blocks.*.op.conv2d.bias"] if key == "conv1d" and conv_bias else [role]
    return Part(f"direct_{key}", Unfreeze(targets=targets), lambda own: own, trained)


def _adapter(kwargs: Mapping[str, Any]) -> Part:
    method = ParallelAdapter(rank=kwargs["dim_adaptf"], scale=kwargs["s_adaptf"], dropout=0.1)

    def rename(own: str) -> str:
        return f"{_op(own)}.adaptf.adapter_{own.rpartition('.')[2]}.weight"

    return Part("parallel_adapter", method, rename, kwargs["train_adaptformer"])


def _affix(kwargs: Mapping[str, Any]) -> Part:
    kind = kwargs["prefix_type"]
    if kind in ("inner_single_prefix", "inner_single_suffix"):
        raise UserError(
            f"prefix_type={kind!r} of the reference crashes on VMamba (its one set of tokens is joined to four "
            f"sequences without repeating it); the correct form is Affix(directions='single')"
        )
    if kind != "inner_dual_prefix":
        raise UserError(f"prefix_type={kind!r} is refused by the reference for VMamba; give 'inner_dual_prefix'")
    projection = kwargs["prefix_projection"]
    hidden = kwargs["encoder_hidden_size"] if projection else None
    method = Affix(tokens=kwargs["num_virtual_tokens"], projection=projection, hidden=hidden)
    return Part("affix", method, lambda own: f"prefix_encoder.{GENERATOR[own]}", kwargs["train_prefix"])


def _additional_scan(kwargs: Mapping[str, Any], bugs: bool) -> Part:
    position = kwargs["scan_addition_pos"]
    if position not in ("prefix", "suffix"):
        raise UserError(f"scan_addition_pos={position!r} is unknown; known: prefix, suffix")
    if not kwargs["scan_A_copy_from_last"]:
        raise UserError(
            "scan_A_copy_from_last=False of the reference crashes on VMamba (a misspelt attribute, whatever "
            "scan_A_constant is); the correct form is AdditionalScan(init='arange') or init='constant'"
        )
    if kwargs["zero_init_x_proj"] and not bugs:
        raise UserError(
            "zero_init_x_proj=True of the reference starts B and C rows at zero, so they never get a gradient; the "
            "correct form is AdditionalScan(zero_c=True). To load it as it is: reproduce_reference_bugs=True"
        )
    method = AdditionalScan(
        states=kwargs["scan_addition_num"], position="before" if position == "prefix" else "after", init="copy"
    )
    names = {"A_logs": "A_log_scan_addi", "x_proj_weight": "x_proj_scan_addi"}

    def rename(own: str) -> str:
        op, _, tensor = own.rpartition(".")
        return f"{op}.{names[tensor]}"

    return Part("additional_scan", method, rename, kwargs["train_additional_scan"])


def _op(own: str) -> str:
    """layers.0.blocks.0.op.x_proj_weight.down → layers.0.blocks.0.op"""
    return own.partition(".op.")[0] + ".op"
