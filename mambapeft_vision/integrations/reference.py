"""Adapters and models of the published MambaPEFT vision code, loaded into ours.

`load_reference` takes that code's own arguments and state dict. Every configuration that it can express is either
computed exactly, or refused with the reason, because some of its forms do not do what their names say.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.backbones.weights import Checkpoint, load_state
from mambapeft_vision.integrations import reference_vmamba
from mambapeft_vision.integrations.reference_backbones import FAMILIES, SSM_SIZES, backbone_arguments
from mambapeft_vision.integrations.reference_parts import GENERATOR, Part, with_defaults
from mambapeft_vision.integrations.reference_svp import svp_arguments, svp_name
from mambapeft_vision.methods.additional_scan import AdditionalScan
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.dora import DoRA
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.offset import Offset
from mambapeft_vision.methods.parallel_adapter import ParallelAdapter
from mambapeft_vision.methods.prompt import Prompt
from mambapeft_vision.methods.unfreeze import Unfreeze
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.state_dict_checks import check_state


def load_reference(
    peft_kwargs: Mapping[str, Any] | None,
    module_kwargs: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    num_classes: int,
    *,
    family: str = "vim",
    backbone_state: Mapping[str, Any] | None = None,
    reproduce_reference_bugs: bool = False,
) -> tuple[AdaptedModel, dict[str, nn.Parameter]]:
    """Builds our model from the reference's arguments and state dict.

    Args:
        peft_kwargs: arguments of its `VimPEFTModel` or `VSSMPEFTModel` (without `module`); None: its plain backbone,
            fully trained.
        module_kwargs: arguments of that backbone (`VisionMamba`, `VSSM`).
        state_dict: tensors or arrays by its names, with or without the `backbone.` prefix of its saved files, or
            the whole file's content. Its saved adapters hold no backbone: give that as `backbone_state`.
        num_classes: number of classes of the head.
        family: the published code: "vim" and "vmamba" (MambaPEFT's), "svp", or one of
            `reference_backbones.FAMILIES`. All but the first two have no PEFT arguments (theirs are all in
            `module_kwargs`, and `peft_kwargs` is None).
        backbone_state: the backbone's tensors by their official names, where `state_dict` has none.
        reproduce_reference_bugs: also load the forms whose behaviour is not what their name says, as they are.
    Returns: the model in evaluation mode (images [B, 3, H, W] → logits), and the parameters that the reference
        trains, head included, by its names (without `backbone.`).
    Raises: UserError for unknown arguments or keys, unsupported forms, and tensors that are missing or mis-shaped.

    Example:
        >>> model, trained = load_reference(  # doctest: +SKIP
        ...     config.peft_kwargs, config.module_kwargs, adapter_state, 100, backbone_state=official_state
        ... )
    """
    if family not in (*_WITH_METHODS, "svp", *FAMILIES):
        raise UserError(f"family={family!r} is unknown; known: {', '.join((*_WITH_METHODS, 'svp', *FAMILIES))}")
    if peft_kwargs is not None and family not in _WITH_METHODS:
        raise UserError(f"peft_kwargs={dict(peft_kwargs)!r}: the published code of {family} has none; give None")
    if family in FAMILIES:
        return _load_plain(family, module_kwargs, state_dict, num_classes)
    if family == "svp":
        module_kwargs, svp = svp_arguments(module_kwargs, reproduce_reference_bugs)
    if family in ("vim", "svp"):
        sizes = _vim_arguments(module_kwargs)
        backbone = create_backbone(_variant(sizes), "random", **sizes)
    else:
        name, sizes = reference_vmamba.backbone_of(module_kwargs)
        backbone = create_backbone(name, "random", **sizes)
    if family == "svp":
        parts, prefix = [Part("svp", svp, svp_name)], ""
    elif peft_kwargs is None:
        parts, prefix = [_full_fine_tuning(backbone)], ""
    else:
        kwargs = with_defaults(peft_kwargs, PEFT_DEFAULTS, "peft_kwargs")
        _refuse_quantised(kwargs)
        _refuse_substring_training(kwargs, reproduce_reference_bugs)
        if family == "vim":
            parts = _parts(kwargs, reproduce_reference_bugs)
        else:
            parts = reference_vmamba.parts_of(kwargs, module_kwargs, reproduce_reference_bugs)
        prefix = "module."

    state = _normalised(state_dict, prefix)
    if backbone_state is not None:
        plain = backbone.convert_checkpoint(_normalised(backbone_state, ""))[0]
        plain = backbone.official_state({k: v for k, v in plain.items() if not k.startswith("head.")})
        state = {**{prefix + k: v for k, v in plain.items()}, **state}
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in state.values()) else torch.float32
    _load_backbone(backbone.to(dtype), state, prefix)

    own_names = dict(backbone.named_parameters())
    targets = {prefix + name: p for name, p in backbone.official_state(own_names).items()}
    model = adapt(backbone, {part.name: part.method for part in parts}, num_classes)
    own = {part.reference_name(prefix, key): p for part in parts for key, p in part.method.owned().items()}
    head = model.head_parameters() if prefix else backbone.official_state(model.head_parameters())
    targets |= own | head
    check_state(targets, state, "the reference's state dict")
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(state[name])

    trained = {reference for part in parts if part.trained for reference in part.references(prefix)}
    for name in set(own) - trained:
        own[name].requires_grad_(False)
    return model.eval(), {n: p for n, p in targets.items() if n in trained or n in head}


def _load_plain(
    family: str, module_kwargs: Mapping[str, Any], state_dict: Mapping[str, Any], num_classes: int
) -> tuple[AdaptedModel, dict[str, nn.Parameter]]:
    """`load_reference` of a code that is a plain backbone, fully trained."""
    name, sizes = backbone_arguments(family, module_kwargs)
    state = _normalised(state_dict, "")
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in state.values()) else torch.float32
    backbone = create_backbone(name, "random", **sizes).to(dtype)
    load_state(backbone, Checkpoint(state), "the reference's state dict")
    names = dict(backbone.named_parameters())
    model = adapt(backbone, {"full": Unfreeze(targets="**")}, num_classes)
    head = model.head_parameters()
    given = {name: tensor for name, tensor in state.items() if name.startswith("head.")}
    check_state(head, given, "the head in the reference's state dict")
    with torch.no_grad():
        for name, parameter in head.items():
            parameter.copy_(given[name])
    return model.eval(), {**names, **head}


def _load_backbone(backbone: TimmModel, state: Mapping[str, Tensor], prefix: str) -> None:
    """Before anything is attached, so that the model knows the hash of the weights it stands on."""
    expected = backbone.official_state(dict(backbone.named_parameters()))
    given = {n: state[prefix + n] for n in expected if prefix + n in state}
    if prefix and not given:
        raise UserError(
            "the state dict holds no backbone (the reference saves adapters without it); give the backbone's "
            "checkpoint as backbone_state, e.g. read_state_dict('vim_s_midclstok_80p5acc.pth')"
        )
    check_state(expected, given, "the reference's state dict")
    backbone.load_state_dict(backbone.convert_checkpoint(given)[0])


# Backbones of MambaPEFT's code; others are published without methods.
_WITH_METHODS = ("vim", "vmamba")

# ------------------------------------------------------------------------------------------------------------
# One switch of the reference = one of our methods


# reference's switch → (its name in ours, targets, rows); a target of x_proj or dt_proj stands for both directions.
_LORA_TARGETS: dict[str, tuple[str, str, str | None]] = {
    "out_proj": ("lora_out_proj", "out_proj", None),
    "in_proj": ("lora_in_proj", "in_proj", None),
    "X": ("lora_p_x", "in_proj", "x"),
    "Z": ("lora_p_z", "in_proj", "z"),
    "x_proj": ("lora_x_proj", "x_proj", None),
    "d": ("lora_p_d", "x_proj", "d"),
    "B": ("lora_p_b", "x_proj", "b"),
    "C": ("lora_p_c", "x_proj", "c"),
    "dt": ("lora_dt_proj", "dt_proj", None),
}
_TWO_DIRECTIONS = ("x_proj", "dt_proj")
_FACTORS = {"down": "adapter_down.weight", "up": "adapter_up.weight", "magnitude": "m"}

# reference's `learnable_*` switch → per trained tensor: our parameter and the reference's name of its offset.
_OFFSETS: dict[str, dict[str, str]] = {
    "A": {"A_log": "learnable_A_log", "A_b_log": "learnable_A_b_log"},
    "D": {"D": "learnable_D", "D_b": "learnable_D_b"},
    "conv1d": {"conv1d.weight": "learnable_conv1d_weight", "conv1d_b.weight": "learnable_conv1d_weight_b"},
    "bias": {"dt_proj.bias": "learnable_bias", "dt_proj_b.bias": "learnable_bias_b"},
    "cls_token": {"cls_token": "learnable_cls_token"},
    "pos_embed": {"pos_embed": "learnable_pos_embed"},
}
_MODEL_TENSORS = ("cls_token", "pos_embed")
# Without `_v2` the tensor itself is trained; for conv1d that includes its bias.
_DIRECT = {switch: tuple(tensors) for switch, tensors in _OFFSETS.items()}
_DIRECT["conv1d"] += ("conv1d.bias", "conv1d_b.bias")


def _parts(kwargs: dict[str, Any], bugs: bool) -> list[Part]:
    parts = [_lora(kwargs, key) for key in _LORA_TARGETS if kwargs[f"lora_{key}"]]
    parts += [_learnable(kwargs, key) for key in _OFFSETS if kwargs[f"learnable_{key}"]]
    optional = {
        "lora_patch_embed": lambda: _patch_embed(kwargs),
        "adaptformer": lambda: _adapter(kwargs),
        "prefix_tuning": lambda: _affix(kwargs, bugs),
        "prompt_tuning": lambda: _prompt(kwargs),
        "additional_scan": lambda: _additional_scan(kwargs, bugs),
    }
    return parts + [build() for switch, build in optional.items() if kwargs[switch]]


def _lora(kwargs: dict[str, Any], key: str) -> Part:
    name, target, rows = _LORA_TARGETS[key]
    suffix = "" if key == "out_proj" else f"_{key}"  # the reference's `dim` and `s` are those of out_proj
    sizes = {"rank": kwargs[f"dim{suffix}"], "scale": kwargs[f"s{suffix}"], "rows": rows}
    both = target in _TWO_DIRECTIONS
    targets = [f"layers.*.mixer.{t}.weight" for t in ((target, f"{target}_b") if both else (target,))]
    if kwargs["use_dora"]:
        method: Method = DoRA(targets=targets, **sizes)
    elif both:
        method = LoRA(targets=targets, space="weight", **sizes)
    else:
        method = LoRA(targets=targets, dropout=0.1, **sizes)

    def rename(own: str) -> str:
        # layers.0.mixer.x_proj_b.weight.down → layers.0.mixer.lora_B_b.adapter_down.weight
        site, _, factor = own.rpartition(".")
        mixer, module, _ = site.rsplit(".", 2)
        direction = "_b" if both and module.endswith("_b") else ""
        return f"{mixer}.lora_{key}{direction}.{_FACTORS[factor]}"

    trained = kwargs[f"train_lora_{key}"] or (key == "dt" and kwargs["train_lora_d"])
    return Part(name, method, rename, trained)


def _learnable(kwargs: dict[str, Any], key: str) -> Part:
    offset = kwargs[f"learnable_{key}_v2"]
    tensors = tuple(_OFFSETS[key]) if offset else _DIRECT[key]
    targets = [t if t in _MODEL_TENSORS else f"layers.*.mixer.{t}" for t in tensors]
    trained = kwargs[f"train_{key}"]
    if not offset:
        # A frozen tensor of the backbone is no method of ours: train_* = False simply leaves it frozen.
        return Part(f"direct_{key}", Unfreeze(targets=targets), lambda own: own, trained)

    def rename(own: str) -> str:
        # layers.0.mixer.conv1d_b.weight.offset → layers.0.mixer.learnable_conv1d_weight_b
        parameter = own.removesuffix(".offset")
        if parameter in _MODEL_TENSORS:
            return _OFFSETS[key][parameter]
        parts = parameter.split(".")
        return ".".join(parts[:3]) + "." + _OFFSETS[key][".".join(parts[3:])]

    return Part(f"offset_{key}", Offset(targets=targets), rename, trained)


def _patch_embed(kwargs: dict[str, Any]) -> Part:
    method = LoRA(
        targets="patch_embed.proj.weight",
        rank=kwargs["dim_patch_embed"],
        scale=kwargs["s_patch_embed"],
        dropout=0.1,
    )
    return Part(
        "lora_embed",
        method,
        lambda own: f"patch_embed.lora_patch_embed.{_FACTORS[own.rpartition('.')[2]]}",
        kwargs["train_lora_patch_embed"],
    )


def _adapter(kwargs: dict[str, Any]) -> Part:
    method = ParallelAdapter(
        targets="layers.*.mixer.out_proj.weight",
        rank=kwargs["dim_adaptf"],
        scale=kwargs["s_adaptf"],
        dropout=0.1,
    )

    def rename(own: str) -> str:
        site, _, factor = own.rpartition(".")
        return f"{site.removesuffix('.out_proj.weight')}.adaptf.{_FACTORS[factor]}"

    return Part("parallel_adapter", method, rename, kwargs["train_adaptformer"])


_AFFIX_FORMS: dict[str, dict[str, Any]] = {
    "inner_single_prefix": {"position": "prefix", "directions": "single", "inner": True},
    "inner_dual_prefix": {"position": "prefix", "directions": "dual", "inner": True},
    "inner_single_infix": {"position": "infix", "directions": "single", "inner": True},
    "inner_dual_infix": {"position": "infix", "directions": "dual", "inner": True},
    "outer_dual_prefix": {"position": "prefix", "directions": "dual", "inner": False},
    "outer_single_prefix": {"position": "prefix", "directions": "single", "inner": False},
}
_CENTRE = (
    "its class-token index is off by one and its backward output is assembled from wrong positions; "
    "the correct form is Affix(position='around_class')"
)
_WRONG_AFFIX = {
    "inner_single_suffix": (
        "its tokens have no effect at all (a causal scan cannot see what follows, and they are cut off again); "
        "the correct form is Affix(position='suffix') or a prefix"
    ),
    "inner_dual_centfix": _CENTRE,
    "inner_dual_centfix_v2": _CENTRE,
    "inner_single_centfix_v2": _CENTRE,
}


def _affix(kwargs: dict[str, Any], bugs: bool) -> Part:
    kind = kwargs["prefix_type"]
    if kind in _WRONG_AFFIX:
        raise UserError(f"prefix_type={kind!r} of the reference is wrong: {_WRONG_AFFIX[kind]}")
    if kind not in _AFFIX_FORMS:
        raise UserError(f"prefix_type={kind!r} is unknown; known: {', '.join([*_AFFIX_FORMS, *_WRONG_AFFIX])}")
    if kind == "outer_single_prefix" and not bugs:
        raise UserError(
            "prefix_type='outer_single_prefix' of the reference reaches the forward scan only; the correct form is "
            "Affix(inner=False, directions='dual'). To load it as it is: reproduce_reference_bugs=True"
        )
    method = Affix(
        tokens=kwargs["num_virtual_tokens"],
        projection=kwargs["prefix_projection"],
        hidden=kwargs["encoder_hidden_size"] if kwargs["prefix_projection"] else None,
        **_AFFIX_FORMS[kind],
    )
    return Part("affix", method, lambda own: f"prefix_encoder.{GENERATOR[own]}", kwargs["train_prefix"])


def _prompt(kwargs: dict[str, Any]) -> Part:
    kind = kwargs["prompt_type"]
    if kind == "infix":
        raise UserError(
            "prompt_type='infix' of the reference reads a token that is not the class token; "
            "the correct form is Prompt(position='infix')"
        )
    if kind not in ("prefix", "suffix", "prefix_suffix"):
        raise UserError(f"prompt_type={kind!r} is unknown; known: prefix, infix, suffix, prefix_suffix")
    method = Prompt(tokens=kwargs["prompt_num_tokens"], position=kind, projection=kwargs["prompt_projection"])
    return Part("prompt", method, lambda own: f"prompt_encoder.{GENERATOR[own]}", kwargs["train_prompt"])


_SCAN_TENSORS = {
    "A_log": "A_log_scan_addi",
    "A_b_log": "A_b_log_scan_addi",
    "x_proj.weight": "x_proj_scan_addi.weight",
    "x_proj_b.weight": "x_proj_b_scan_addi.weight",
}


def _additional_scan(kwargs: dict[str, Any], bugs: bool) -> Part:
    position = kwargs["scan_addition_pos"]
    if position not in ("prefix", "suffix"):
        raise UserError(f"scan_addition_pos={position!r} is unknown; known: prefix, suffix")
    if kwargs["zero_init_x_proj"] and not bugs:
        raise UserError(
            "zero_init_x_proj=True of the reference starts B and C rows at zero, so they never get a gradient; the "
            "correct form is AdditionalScan(zero_c=True). To load it as it is: reproduce_reference_bugs=True"
        )
    constant = kwargs["scan_A_constant"]
    init = "copy" if kwargs["scan_A_copy_from_last"] else "arange" if constant is None else "constant"
    method = AdditionalScan(
        states=kwargs["scan_addition_num"],
        position="before" if position == "prefix" else "after",
        init=init,
        constant=constant if init == "constant" else None,
    )

    def rename(own: str) -> str:
        parts = own.split(".")
        return ".".join(parts[:3]) + "." + _SCAN_TENSORS[".".join(parts[3:])]

    return Part("additional_scan", method, rename, kwargs["train_additional_scan"])


def _full_fine_tuning(backbone: TimmModel) -> Part:
    names = {own: next(iter(backbone.official_state({own: p}))) for own, p in backbone.named_parameters()}
    return Part("full", Unfreeze(targets="**"), names.__getitem__)


def _refuse_quantised(kwargs: dict[str, Any]) -> None:
    for key, value in kwargs.items():
        if key.startswith("bit") and value != 32:
            raise UserError(f"{key}={value!r}: the reference implements 32 only; leave it out")


def _refuse_substring_training(kwargs: dict[str, Any], bugs: bool) -> None:
    """`train_lora_dt=False` alone does nothing there: 'lora_d' is found in 'lora_dt'."""
    stuck = kwargs["lora_dt"] and not kwargs["train_lora_dt"] and kwargs["train_lora_d"]
    if stuck and not bugs:
        raise UserError(
            "train_lora_dt=False has no effect in the reference while train_lora_d is True (it looks for 'lora_d' "
            "within the name 'lora_dt'); give train_lora_d=False too to freeze it, or reproduce_reference_bugs=True "
            "to train it as the reference does"
        )


# ------------------------------------------------------------------------------------------------------------
# Arguments and names


_LORA_DEFAULTS = {
    **{f"lora_{k}": False for k in (*_LORA_TARGETS, "patch_embed")},
    **{f"train_lora_{k}": True for k in (*_LORA_TARGETS, "patch_embed")},
    **{f"dim{s}": 32 for s in ("", "_in_proj", "_X", "_Z", "_patch_embed", "_adaptf")},
    **{f"dim_{k}": 4 for k in ("x_proj", "d", "B", "C", "dt")},
    **{f"{n}{s}": v for n, v in (("s", 1), ("bit", 32)) for s in ("", *(f"_{k}" for k in _LORA_TARGETS))},
    **{f"{n}_{s}": v for n, v in (("s", 1), ("bit", 32)) for s in ("patch_embed", "adaptf")},
}
for _surplus in ("s_out_proj", "bit_out_proj"):
    del _LORA_DEFAULTS[_surplus]
PEFT_DEFAULTS: dict[str, Any] = {
    **_LORA_DEFAULTS,
    "adaptformer": False,
    "train_adaptformer": True,
    "prefix_tuning": False,
    "prefix_type": "inner_single_prefix",
    "prefix_projection": True,
    "num_virtual_tokens": 1,
    "encoder_hidden_size": None,
    "train_prefix": True,
    "prompt_tuning": False,
    "prompt_type": "prefix",
    "prompt_projection": True,
    "prompt_num_tokens": 2,
    "train_prompt": True,
    "additional_scan": False,
    "scan_addition_num": 1,
    "scan_addition_pos": "suffix",
    "scan_A_constant": None,
    "scan_A_copy_from_last": False,
    "zero_init_x_proj": False,
    "train_additional_scan": True,
    **{f"learnable_{k}{v}": False for k in _OFFSETS for v in ("", "_v2")},
    **{f"train_{k}": True for k in _OFFSETS},
    "use_dora": False,
}

# Arguments of the reference's VisionMamba: our name, or the only value that we (and its PEFT code) support.
_MODULE_RENAMED = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "stride": "stride",
    "depth": "depth",
    "embed_dim": "embed_dim",
    "channels": "in_chans",
    "drop_path_rate": "drop_path_rate",
    "norm_epsilon": "norm_eps",
    "if_devide_out": "halve_sum",
}
_MODULE_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "stride": 16,
    "depth": 24,
    "embed_dim": 192,
    "channels": 3,
    "drop_path_rate": 0.1,
    "norm_epsilon": 1e-5,
    "if_devide_out": False,
    "ssm_cfg": None,
}
_MODULE_REQUIRED: dict[str, tuple[Any, Any]] = {  # argument → (the reference's default, the value supported)
    "rms_norm": (False, True),
    "if_abs_pos_embed": (False, True),
    "bimamba_type": ("none", "v2"),
    "if_cls_token": (False, True),
    "use_middle_cls_token": (False, True),
    "use_double_cls_token": (False, False),
    "if_bidirectional": (False, False),
    "if_bimamba": (False, False),
    "if_rope": (False, False),
    "init_layer_scale": (None, None),
    "drop_rate": (0.0, 0.0),
}
# Without effect on what is computed (given the values above).
_MODULE_IGNORED = {
    "type", "num_classes", "initializer_cfg", "fused_add_norm", "residual_in_fp32", "device", "dtype", "ft_seq_len",
    "pt_hw_seq_len", "final_pool_type", "if_rope_residual", "init_cfg",
}  # fmt: skip


def _vim_arguments(module_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known = {**_MODULE_DEFAULTS, **{k: d for k, (d, _) in _MODULE_REQUIRED.items()}}
    known["flip_img_sequences_ratio"] = -1.0
    given = {k: v for k, v in module_kwargs.items() if k not in _MODULE_IGNORED}
    values = with_defaults(given, known, "module_kwargs")
    for key, (_, supported) in _MODULE_REQUIRED.items():
        if values[key] != supported:
            raise UserError(f"module_kwargs: {key}={values[key]!r}; only {supported!r} is supported (as in the paper)")
    if values["flip_img_sequences_ratio"] > 0:
        raise UserError("module_kwargs: flip_img_sequences_ratio > 0 (random flips) is not supported")
    ssm = dict(values["ssm_cfg"] or {})
    unknown = sorted(set(ssm) - set(SSM_SIZES))
    if unknown:
        raise UserError(f"module_kwargs: ssm_cfg has {', '.join(unknown)}; supported: {', '.join(SSM_SIZES)}")
    if ssm.get("dt_rank") == "auto":
        del ssm["dt_rank"]
    return {ours: values[theirs] for theirs, ours in _MODULE_RENAMED.items()} | ssm


def _variant(sizes: Mapping[str, Any]) -> str:
    """The registered variant that these sizes belong to (sizes of its own are given beside the name)."""
    width = {192: "tiny", 384: "small", 768: "base"}.get(sizes["embed_dim"], "tiny")
    stride = "_stride8" if sizes["stride"] == 8 and sizes["patch_size"] == 16 else ""
    return f"vim_{width}_patch16{stride}_224"


def _normalised(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Tensors by the reference's names as in its live model: no `backbone.`, the head as `head.weight`."""
    if isinstance(state_dict.get("state_dict"), Mapping):  # a file as its trainer saves it
        state_dict = state_dict["state_dict"]
    elif isinstance(state_dict.get("model"), Mapping):  # an official Vim checkpoint
        state_dict = state_dict["model"]
    state: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = key.removeprefix("backbone.")
        if name.startswith("head.layers.head."):
            name = name.replace("head.layers.head.", "head.")
        if name.startswith(f"{prefix}head."):
            name = name.removeprefix(prefix)
        tensor = torch.as_tensor(value)
        state[name] = tensor if tensor.dtype == torch.float64 else tensor.float()
    return state
