"""Specs of methods as configs give them: sizes that differ by backbone, old names, old spellings.

Light to import: planning a sweep needs no PyTorch.
"""

from collections.abc import Mapping
from typing import Any

from mambapeft_vision.utils.errors import UserError

DEFAULT = "default"

#: Presets that were copies of others for Vim-B: old name → what to write instead.
RENAMED = {
    f"{name}_base": f"method={name} backbone=vim_b"
    for name in ("additional_scan", "affix", "conv1d", "lora_in_proj", "lora_out_proj", "lora_p_x", "parallel_adapter")
}

# Role → the pattern of Vim's or ViT's names that presets had before there were roles.
_PATTERNS: dict[str, list[str]] = {
    "patch_embed": ["patch_embed.proj.weight"],
    "norm": ["layers.*.norm.weight", "norm_f.weight"],
    "in_proj": ["layers.*.mixer.in_proj.weight"],
    "out_proj": ["layers.*.mixer.out_proj.weight"],
    "x_proj": ["layers.*.mixer.x_proj.weight", "layers.*.mixer.x_proj_b.weight"],
    "dt_proj": ["layers.*.mixer.dt_proj.weight", "layers.*.mixer.dt_proj_b.weight"],
    "dt_bias": ["layers.*.mixer.dt_proj.bias", "layers.*.mixer.dt_proj_b.bias"],
    "conv": ["layers.*.mixer.conv1d.weight", "layers.*.mixer.conv1d_b.weight"],
    "A_log": ["layers.*.mixer.A_log", "layers.*.mixer.A_b_log"],
    "D": ["layers.*.mixer.D", "layers.*.mixer.D_b"],
    "qkv": ["blocks.*.attn.qkv.weight"],
}


def for_backbone(methods: Mapping[str, Any], backbone: str | None) -> dict[str, Any]:
    """The methods' specs with every size that is given by backbone resolved.

    Such a size is a mapping, e.g. `rank: {default: 32, vim_b: 64}`: `default`, and for other backbones the beginning of
    their registered names; the longest one that fits counts. A size given on the command line replaces the mapping.

    Args:
        backbone: its registered name, e.g. vim_base_patch16_224; None: the defaults.
    Raises: UserError for a mapping with other values than sizes.
    """
    return {
        name: {key: _size(value, backbone, f"method.{name}.{key}") for key, value in spec.items()}
        if isinstance(spec, Mapping)  # anything else is for build_method to refuse
        else spec
        for name, spec in methods.items()
    }


def _size(value: Any, backbone: str | None, where: str) -> Any:
    if not (isinstance(value, Mapping) and DEFAULT in value):
        return value
    if any(isinstance(size, (Mapping, list)) for size in value.values()):
        raise UserError(f"{where}={dict(value)!r}; expected one value for {DEFAULT} and for each name of a backbone")
    fitting = [key for key in value if backbone is not None and backbone.startswith(str(key))]
    return value[max(fitting, key=len, default=DEFAULT)]


def under_new_names(methods: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded run's methods by the names that they have today."""
    return {name.removesuffix("_base") if name in RENAMED else name: spec for name, spec in methods.items()}


def in_old_words(methods: Mapping[str, Any]) -> dict[str, Any]:
    """The specs with roles spelled as the patterns of earlier releases: a run keeps its identity and its label."""
    return {
        name: {key: _patterns(value) if key in ("targets", "no_decay") else value for key, value in spec.items()}
        if isinstance(spec, Mapping)
        else spec
        for name, spec in methods.items()
    }


def _patterns(targets: Any) -> Any:
    if isinstance(targets, str) and targets in _PATTERNS:
        patterns = _PATTERNS[targets]
        return patterns[0] if len(patterns) == 1 else patterns
    if isinstance(targets, list):
        lists = [_PATTERNS.get(target, [target]) if isinstance(target, str) else [target] for target in targets]
        return [pattern for patterns in lists for pattern in patterns]
    return targets
