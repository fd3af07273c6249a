"""Random configurations of the reference against a dense, independent recomputation, in float64."""

import random

import pytest
import torch
from helpers import dense_reference
from helpers.random_states import error, gradients, values

from mambapeft_vision.integrations.reference import PEFT_DEFAULTS, load_reference

AFFIX_KINDS = [f"inner_{d}_{p}" for d in ("single", "dual") for p in ("prefix", "infix")]
AFFIX_KINDS += ["outer_dual_prefix", "outer_single_prefix"]


def draw(rng: random.Random) -> tuple[dict, dict]:
    """peft_kwargs and module_kwargs."""
    module = {
        "img_size": rng.choice([16, 24]),
        "patch_size": 8,
        "stride": rng.choice([8, 4]),
        "embed_dim": rng.choice([16, 24]),
        "depth": rng.choice([1, 2]),
        "rms_norm": True,
        "if_abs_pos_embed": True,
        "bimamba_type": "v2",
        "if_cls_token": True,
        "use_middle_cls_token": True,
        "if_devide_out": rng.random() < 0.7,
        "norm_epsilon": rng.choice([1e-5, 1e-3]),
    }
    if rng.random() < 0.2:
        module["ssm_cfg"] = {"d_state": rng.choice([4, 8])}
    peft: dict = {"use_dora": rng.random() < 0.4}
    for name in ("out_proj", "in_proj", "X", "Z", "x_proj", "d", "B", "C", "dt", "patch_embed"):
        suffix = "" if name == "out_proj" else f"_{name}"
        if rng.random() < 0.3:
            peft |= {f"lora_{name}": True, f"dim{suffix}": rng.randint(1, 7), f"s{suffix}": rng.choice([0.1, 1.0, 2.0])}
    if rng.random() < 0.3:
        peft |= {"adaptformer": True, "dim_adaptf": rng.randint(1, 7), "s_adaptf": 0.3}
    if rng.random() < 0.6:
        peft |= {"prefix_tuning": True, "prefix_type": rng.choice(AFFIX_KINDS), "num_virtual_tokens": rng.randint(1, 4)}
        peft |= {"prefix_projection": rng.random() < 0.5, "encoder_hidden_size": rng.choice([None, 7])}
    if rng.random() < 0.4:
        peft |= {"prompt_tuning": True, "prompt_type": rng.choice(["prefix", "suffix", "prefix_suffix"])}
        peft |= {"prompt_num_tokens": rng.randint(2, 5), "prompt_projection": rng.random() < 0.5}
    if rng.random() < 0.4:
        peft |= {"additional_scan": True, "scan_addition_num": rng.randint(1, 4)}
        peft |= {"scan_addition_pos": rng.choice(["prefix", "suffix"]), "scan_A_copy_from_last": rng.random() < 0.5}
    for name in ("A", "D", "conv1d", "bias", "cls_token", "pos_embed"):
        if rng.random() < 0.3:
            peft |= {f"learnable_{name}": True, f"learnable_{name}_v2": rng.random() < 0.7}
    return peft, module


@pytest.mark.parametrize("seed", range(24))
def test_logits_and_gradients(seed):
    peft, module = draw(random.Random(seed))
    complete = {**PEFT_DEFAULTS, **peft}
    state = values(dense_reference.state_shapes(complete, module, 5), seed)
    images = torch.randn(2, 3, module["img_size"], module["img_size"], dtype=torch.float64)

    model, names = load_reference(peft, module, state, 5, reproduce_reference_bugs=True)
    found = gradients(model, names, state, images, lambda s, x: dense_reference.logits(s, complete, module, x))
    for name, (ours, theirs) in found.items():
        if theirs is None:  # the tensor takes no part (DoRA's is always needed, a dead gate half has zeros)
            assert ours is None or not ours.any(), name
        else:
            assert error(ours, theirs) < 1e-9, name
