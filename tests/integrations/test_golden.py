"""Our model against the reference's own numbers, in float64: logits, loss and every gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden_values import CONFIGURATIONS, load_golden

from mambapeft_vision.integrations.reference import load_reference
from mambapeft_vision.utils.errors import UserError

TOLERANCE = 1e-10


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    scale = np.abs(theirs).max()
    return float(np.abs(ours - theirs).max() / (scale if scale else 1.0))


def reference_model(golden: dict, params: dict | None = None, **options):
    config = golden["config"]
    return load_reference(
        config["peft_kwargs"], config["module_kwargs"], params or golden["params"], config["num_classes"], **options
    )


def test_every_configuration_is_here():
    assert len(CONFIGURATIONS) == 31


@pytest.mark.parametrize("kernel", ["torch", "naive"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_loss_and_gradients(name, kernel):
    golden = load_golden(name)
    model, names = reference_model(golden)
    model.backbone.set_kernel(kernel, "cpu")
    logits = model(torch.from_numpy(golden["input"]).double())
    loss = F.cross_entropy(logits, torch.from_numpy(golden["labels"]))
    loss.backward()
    assert logits.dtype == torch.float64
    assert relative(logits.detach().numpy(), golden["logits"]) < TOLERANCE
    assert abs(loss.item() - float(golden["loss"])) < TOLERANCE * float(golden["loss"])
    assert set(names) == set(golden["grads"])
    for key, gradient in golden["grads"].items():
        assert names[key].grad is not None, key
        assert relative(names[key].grad.numpy(), gradient) < TOLERANCE, key
    trained = {id(p) for p in names.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


def test_names_of_saved_files_are_understood():
    golden = load_golden("lora_X")
    saved = {
        f"backbone.{k}" if not k.startswith("head.") else k.replace("head.", "head.layers.head."): v
        for k, v in golden["params"].items()
    }
    image = torch.from_numpy(golden["input"]).double()
    model, _ = reference_model(golden, {"state_dict": saved, "meta": {}})
    assert relative(model(image).detach().numpy(), golden["logits"]) < TOLERANCE
    adapter = {k: v for k, v in saved.items() if "lora" in k or "head" in k}
    backbone = {
        k.removeprefix("module."): v for k, v in golden["params"].items() if "lora" not in k and "head" not in k
    }
    with pytest.raises(UserError, match="holds no backbone"):
        reference_model(golden, adapter)
    model, _ = reference_model(golden, adapter, backbone_state={"model": backbone})
    assert relative(model(image).detach().numpy(), golden["logits"]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lora_X", {"lora_Y": True}, "unknown argument.*lora_Y"),
        ("lora_X", {"bit_X": 8}, "bit_X=8"),
        ("prefix_inner_single_prefix_noproj", {"prefix_type": "inner_single_suffix"}, "no effect at all"),
        ("prefix_inner_single_prefix_noproj", {"prefix_type": "inner_dual_centfix"}, "off by one"),
        ("prefix_inner_single_prefix_noproj", {"prefix_type": "outer_single_prefix"}, "forward scan only"),
        ("prefix_inner_single_prefix_noproj", {"prefix_type": "nonsense"}, "unknown; known"),
        ("prompt_prefix_noproj", {"prompt_type": "infix"}, "not the class token"),
        ("addscan_suffix_const", {"zero_init_x_proj": True}, "never get a gradient"),
        ("lora_dt", {"train_lora_dt": False}, "no effect in the reference"),
    ],
)
def test_wrong_forms_are_refused_with_the_reason(name, change, message):
    golden = load_golden(name)
    golden["config"]["peft_kwargs"] |= change
    with pytest.raises(UserError, match=message):
        reference_model(golden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm": False}, "rms_norm=False"),
        ({"if_rope": True}, "if_rope=True"),
        ({"ssm_cfg": {"nope": 1}}, "ssm_cfg has nope"),
        ({"depht": 3}, "unknown argument.*depht"),
    ],
)
def test_unsupported_backbones_are_refused(change, message):
    golden = load_golden("lp")
    golden["config"]["module_kwargs"] |= change
    with pytest.raises(UserError, match=message):
        reference_model(golden)


def test_missing_unknown_and_misshaped_keys_are_named():
    golden = load_golden("lora_X")
    key = "module.layers.0.mixer.lora_X.adapter_up.weight"
    for change, message in (
        ({key: None}, "missing: lora|missing: module.layers.0.mixer.lora_X.adapter_up.weight"),
        ({"module.extra": np.zeros(3)}, "unknown: module.extra"),
        ({key: np.zeros((3, 3))}, "shape of module.layers.0.mixer.lora_X"),
    ):
        params = {k: v for k, v in {**golden["params"], **change}.items() if v is not None}
        with pytest.raises(UserError, match=message):
            reference_model(golden, params)


def test_frozen_parts_keep_their_values_but_do_not_train():
    golden = load_golden("hybrid_step2")
    golden["config"]["peft_kwargs"] |= {"train_A": False, "train_prefix": False}
    model, names = reference_model(golden)
    logits = model(torch.from_numpy(golden["input"]).double())
    assert relative(logits.detach().numpy(), golden["logits"]) < TOLERANCE
    expected = {k for k in golden["grads"] if "learnable_A" not in k and "prefix_encoder" not in k}
    assert set(names) == expected


@pytest.mark.parametrize(
    ("switch", "trained"),
    [
        ("learnable_A", {"mixer.A_log", "mixer.A_b_log"}),
        ("learnable_D", {"mixer.D", "mixer.D_b"}),
        ("learnable_conv1d", {f"mixer.conv1d{b}.{t}" for b in ("", "_b") for t in ("weight", "bias")}),
        ("learnable_bias", {"mixer.dt_proj.bias", "mixer.dt_proj_b.bias"}),
    ],
)
def test_forms_that_train_the_tensors_themselves(switch, trained):
    """Without `_v2` the reference trains the backbone's own tensors; so the gradients are those of full tuning."""
    golden, full = load_golden("lp"), load_golden("full_ft")
    golden["config"]["peft_kwargs"] = {switch: True}
    params = {f"module.{k}" if not k.startswith("head") else k: v for k, v in full["params"].items()}
    model, names = reference_model(golden, params)
    F.cross_entropy(model(torch.from_numpy(full["input"]).double()), torch.from_numpy(full["labels"])).backward()
    layers = range(full["config"]["module_kwargs"]["depth"])
    assert set(names) == {f"module.layers.{i}.{t}" for i in layers for t in trained} | {"head.weight", "head.bias"}
    for name, parameter in names.items():
        assert relative(parameter.grad.numpy(), full["grads"][name.removeprefix("module.")]) < TOLERANCE
