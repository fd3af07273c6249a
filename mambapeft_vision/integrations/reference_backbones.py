"""Arguments of the published codes of Mamba-Reg, VideoMamba and ARM, as sizes of our backbones.

Each of these codes is a plain backbone; none of them has PEFT arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambapeft_vision.utils.errors import UserError

SSM_SIZES = ("d_state", "d_conv", "expand", "dt_rank")
# The reference's argument → ours, in all three codes.
_RENAMED = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "stride": "stride",
    "depth": "depth",
    "embed_dim": "embed_dim",
    "channels": "in_chans",
    "drop_path_rate": "drop_path_rate",
    "norm_epsilon": "norm_eps",
}
_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "stride": 16,
    "depth": 24,
    "embed_dim": 192,
    "channels": 3,
    "drop_path_rate": 0.1,
    "norm_epsilon": 1e-5,
    "ssm_cfg": None,
}
# Without effect on what is computed in evaluation.
_IGNORED = {
    "type", "num_classes", "initializer_cfg", "fused_add_norm", "residual_in_fp32", "device", "dtype", "ft_seq_len",
    "pt_hw_seq_len", "final_pool_type", "init_cfg", "bimamba", "fc_drop_rate", "kernel_size", "num_frames",
    "use_checkpoint", "checkpoint_num",
}  # fmt: skip
# Argument → (the reference's default, the value that is supported).
_VIM_SWITCHES: dict[str, tuple[Any, Any]] = {
    "if_bidirectional": (False, False),
    "if_bimamba": (False, False),
    "use_double_cls_token": (False, False),
    "if_rope": (False, False),
    "if_rope_residual": (False, False),
    "drop_rate": (0.0, 0.0),
}


@dataclass(frozen=True)
class _Code:
    """One published code.

    variant: the registered name whose sizes its arguments then change.
    defaults: arguments beside those of all three, with the reference's defaults.
    required: argument → (the reference's default, the value that is supported).
    """

    variant: str
    defaults: dict[str, Any]
    required: dict[str, tuple[Any, Any]]

    def sizes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {ours: values[theirs] for theirs, ours in _RENAMED.items()}
        if "num_cls_tokens" in values:
            sizes |= {"num_cls_tokens": values["num_cls_tokens"], "cls_reduce": values["cls_reduce"]}
        if "global_pool" in values:
            sizes["global_pool"] = "avg" if values["global_pool"] else "token"
        return sizes


_CODES = {
    "mambareg": _Code(
        "mambareg_small_patch16_224",
        {"num_cls_tokens": 1, "cls_reduce": 1, "stride": None},  # None: the patch size
        {
            **_VIM_SWITCHES,
            "rms_norm": (False, True),
            "if_abs_pos_embed": (True, True),
            "bimamba_type": ("v2", "v2"),
            "if_cls_token": (True, True),
            "if_devide_out": (True, True),
            "use_middle_cls_token": (False, False),
        },
    ),
    "videomamba": _Code("videomamba_tiny_patch16_224", {}, {"rms_norm": (True, True), "drop_rate": (0.0, 0.0)}),
    "arm": _Code(
        "arm_base_patch16_224",
        {"global_pool": False},
        {
            **_VIM_SWITCHES,
            "rms_norm": (False, True),
            "if_abs_pos_embed": (False, True),
            "bimamba_type": ("none", "v3"),
            "if_cls_token": (False, True),
            "if_devide_out": (False, True),
            "use_middle_cls_token": (False, True),
        },
    ),
}
FAMILIES = tuple(_CODES)


def backbone_arguments(family: str, module_kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered name and the sizes of our backbone that computes the same as the reference's arguments.

    Raises: UserError for unknown arguments and for forms that are not supported.
    """
    code = _CODES[family]
    known = {**_DEFAULTS, **code.defaults, **{name: default for name, (default, _) in code.required.items()}}
    given = {name: value for name, value in module_kwargs.items() if name not in _IGNORED}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(
            f"module_kwargs: {family}'s code has no argument {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    values = {**known, **given}
    for name, (_, supported) in code.required.items():
        if values[name] != supported:
            raise UserError(f"module_kwargs: {name}={values[name]!r}; only {supported!r} is supported for {family}")
    ssm = dict(values["ssm_cfg"] or {})
    if set(ssm) - set(SSM_SIZES):
        raise UserError(
            f"module_kwargs: ssm_cfg has {', '.join(sorted(set(ssm) - set(SSM_SIZES)))}; supported: "
            f"{', '.join(SSM_SIZES)}"
        )
    if ssm.get("dt_rank") == "auto":
        del ssm["dt_rank"]
    return code.variant, {**code.sizes(values), **ssm}
