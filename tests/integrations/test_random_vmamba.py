"""Random configurations of MambaPEFT's VMamba against a dense, independent recomputation, in float64."""

import random

import pytest
import torch
from helpers import dense_vmamba
from helpers.random_states import error, gradients, values

from mambapeft_vision.integrations.reference import PEFT_DEFAULTS, load_reference

CLASSES = 5


def draw(rng: random.Random, everything: bool) -> tuple[dict, dict]:
    """peft_kwargs and module_kwargs; everything: all methods at once."""

    def chosen(probability: float) -> bool:
        return everything or rng.random() < probability

    stages = rng.choice([2, 3])
    module = {
        "patch_size": rng.choice([4, 8]),
        "in_chans": rng.choice([1, 3]),
        "dims": [rng.choice([6, 10]) * 2**stage for stage in range(stages)],
        "depths": [rng.choice([1, 2]) for _ in range(stages)],
        "ssm_d_state": rng.choice([1, 2, 3, 16]),
        "ssm_ratio": rng.choice([1.0, 1.5, 2.0]),
        "ssm_dt_rank": rng.choice(["auto", 3]),
        "ssm_conv_bias": rng.random() < 0.3,
        "forward_type": "v05_noz",
        "mlp_ratio": rng.choice([1.5, 4.0]),
        "norm_layer": "ln2d",
        "downsample_version": "v3",
        "patchembed_version": "v2",
        "drop_path_rate": rng.choice([0.0, 0.3]),
    }
    peft: dict = {}
    for name in ("out_proj", "in_proj", "x_proj", "d", "B", "C", "dt"):
        suffix = "" if name == "out_proj" else f"_{name}"
        if chosen(0.35):
            peft |= {f"lora_{name}": True, f"dim{suffix}": rng.randint(1, 7), f"s{suffix}": rng.choice([0.1, 1.0, 2.0])}
    if chosen(0.3):
        peft |= {"adaptformer": True, "dim_adaptf": rng.randint(1, 7), "s_adaptf": 0.3}
    if chosen(0.5):
        peft |= {"prefix_tuning": True, "prefix_type": "inner_dual_prefix", "num_virtual_tokens": rng.randint(1, 4)}
        peft |= {"prefix_projection": rng.random() < 0.5, "encoder_hidden_size": rng.choice([None, 7])}
    if chosen(0.5):
        peft |= {"additional_scan": True, "scan_addition_num": rng.randint(1, 4), "scan_A_copy_from_last": True}
        peft |= {"scan_addition_pos": rng.choice(["prefix", "suffix"])}
    for name in ("A", "D", "conv1d", "bias"):
        if chosen(0.35):
            peft |= {f"learnable_{name}": True, f"learnable_{name}_v2": rng.random() < 0.7}
    if not {"lora_in_proj", "lora_out_proj", "adaptformer"} & peft.keys() and rng.random() < 0.5:
        module["norm_layer"] = "ln"  # channels last: the same function
    return peft, module


@pytest.mark.parametrize("seed", range(16))
def test_logits_and_gradients(seed):
    peft, module = draw(random.Random(seed), everything=seed < 2)
    complete = {**PEFT_DEFAULTS, **peft}
    state = values(dense_vmamba.state_shapes(complete, module, CLASSES), seed)
    height, width = random.Random(seed).choices([33, 40, 48], k=2)
    images = torch.randn(2, module["in_chans"], height, width, dtype=torch.float64)

    model, names = load_reference(peft, module, state, CLASSES, family="vmamba")
    model.backbone.set_kernel("torch", "cpu")
    added = {n for n in state if any(part in n for part in ("lora_", "adaptf", "learnable", "addi", "prefix", "head."))}
    assert added <= names.keys()
    found = gradients(model, names, state, images, lambda s, x: dense_vmamba.logits(s, complete, module, x))
    for name, (ours, theirs) in found.items():
        assert theirs is not None, name
        assert error(ours, theirs) < 1e-9, name
