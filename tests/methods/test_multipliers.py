"""Learning-rate and decay multipliers are those that the reference's optimiser really gave each tensor.

reference_multipliers.json: for every published configuration that a preset stands for, each trained tensor's
(lr_mult, decay_mult), as measured on the reference's own optimiser.
"""

import json
import re
from pathlib import Path

import pytest
from helpers.method_cases import PRESETS, tiny_model

REFERENCE = json.loads((Path(__file__).parent / "reference_multipliers.json").read_text())

# Our trained tensor (`method.tensor`, layers as *) → the reference's name.
MIXER = r"layers\.\*\.mixer\."
RENAMES = [
    (
        rf"(?:lora|dora)_p_([xz])\.({MIXER})in_proj\.weight\.(\w+)",
        lambda m: f"{m[2]}lora_{m[1].upper()}.{FACTOR[m[3]]}",
    ),
    (rf"lora_(in|out)_proj\.({MIXER})\w+\.weight\.(\w+)", lambda m: f"{m[2]}lora_{m[1]}_proj.{FACTOR[m[3]]}"),
    (rf"lora_p_([dbc])\.({MIXER})x_proj(_b)?\.weight\.(\w+)", lambda m: rows_name(m[1], m[2], m[3], m[4])),
    (rf"lora_x_proj\.({MIXER})x_proj(_b)?\.weight\.(\w+)", lambda m: f"{m[1]}lora_x_proj{m[2] or ''}.{FACTOR[m[3]]}"),
    (rf"lora_dt_proj\.({MIXER})dt_proj(_b)?\.weight\.(\w+)", lambda m: f"{m[1]}lora_dt{m[2] or ''}.{FACTOR[m[3]]}"),
    (r"lora_embed\.patch_embed\.proj\.weight\.(\w+)", lambda m: f"patch_embed.lora_patch_embed.{FACTOR[m[1]]}"),
    (rf"(?:a|d)\.({MIXER})(\w+)\.offset", lambda m: f"{m[1]}learnable_{m[2]}"),
    (rf"conv1d\.({MIXER})conv1d(_b)?\.weight\.offset", lambda m: f"{m[1]}learnable_conv1d_weight{m[2] or ''}"),
    (rf"bias\.({MIXER})dt_proj(_b)?\.bias\.offset", lambda m: f"{m[1]}learnable_bias{m[2] or ''}"),
    (r"(?:cls_token|pos_embed)\.(\w+)\.offset", lambda m: f"learnable_{m[1]}"),
    (rf"parallel_adapter\.({MIXER})out_proj\.weight\.(\w+)", lambda m: f"{m[1]}adaptf.{FACTOR[m[2]]}"),
    (rf"additional_scan\.({MIXER})(A_log|A_b_log)", lambda m: f"{m[1]}{m[2]}_scan_addi"),
    (rf"additional_scan\.({MIXER})(x_proj|x_proj_b)\.weight", lambda m: f"{m[1]}{m[2]}_scan_addi.weight"),
    (r"affix\.(.+)", lambda m: f"prefix_encoder.{GENERATOR[m[1]]}"),
    (r"prompt\.(.+)", lambda m: f"prompt_encoder.{GENERATOR[m[1]]}"),
    (r"(?:full|scratch)\.(.+)", lambda m: m[1]),
    (r"head\.(\w+)", lambda m: f"head.layers.head.{m[1]}"),
]
FACTOR = {"down": "adapter_down.weight", "up": "adapter_up.weight", "magnitude": "m"}
GENERATOR = {
    "table": "embedding.weight",
    "embedding": "embedding.weight",
    "fc1.weight": "transform.0.weight",
    "fc1.bias": "transform.0.bias",
    "fc2.weight": "transform.2.weight",
    "fc2.bias": "transform.2.bias",
}


def rows_name(rows: str, mixer: str, backward: str | None, factor: str) -> str:
    return f"{mixer}lora_{rows if rows == 'd' else rows.upper()}{backward or ''}.{FACTOR[factor]}"


def reference_name(name: str) -> str:
    name = re.sub(r"\blayers\.\d+\.", "layers.*.", name)
    name = re.sub(r"^(all|hybrid)_", "", name)  # in a hybrid: the part's own name
    name = re.sub(r"^(\w+)_(r24|wo_proj)\.", r"\1.", name)  # another form of the same method
    for pattern, rename in RENAMES:
        if match := re.fullmatch(pattern, name):
            return rename(match)
    raise AssertionError(f"no reference name for {name}")


@pytest.mark.parametrize("name", REFERENCE)
def test_multipliers(name):
    model = tiny_model((name.removesuffix("_base"),))  # Vim-B's presets differ from Vim-S's in sizes alone
    groups = model.param_groups(lr=1.0, weight_decay=1.0)  # so that rates and decays are the multipliers
    of = {id(p): [group["lr"], group["weight_decay"]] for group in groups for p in group["params"]}
    ours = {}
    for trained, p in model.trained().items():
        assert ours.setdefault(reference_name(trained), of[id(p)]) == of[id(p)], trained
    expected = dict(REFERENCE[name]["params"])
    if name == "hybrid":  # that configuration still has LoRA on B, which the search dropped
        expected = {key: value for key, value in expected.items() if "lora_B" not in key}
    assert ours == expected


@pytest.mark.parametrize("name", REFERENCE)
def test_clipping_is_off_where_the_reference_does_not_clip(name):
    clipped = "clip_norm" not in PRESETS[name.removesuffix("_base")].overrides.get("trainer", {})
    assert clipped == (REFERENCE[name]["clip"] is not None)
