"""Methods on VMamba against values of MambaPEFT's published code in float64: logits, loss and every gradient."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones.vmamba import VMamba
from mambapeft_vision.backbones.weights import Checkpoint, export_official, load_state, load_weights, read_state_dict
from mambapeft_vision.methods.additional_scan import AdditionalScan
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.linear_probe import LinearProbe
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.offset import Offset
from mambapeft_vision.methods.parallel_adapter import ParallelAdapter
from mambapeft_vision.methods.state_offset import StateOffset
from mambapeft_vision.utils.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "vmamba"

# File → the method with its sizes, and the names of its tensors: our ending → the published code's.
LORA = {"down": "adapter_down", "up": "adapter_up"}
CASES = {
    "lp": (LinearProbe, {}, {}),
    "lora_in_proj": (LoRA, {"targets": "in_proj", "rank": 4, "scale": 1.0}, LORA),
    "lora_out_proj": (LoRA, {"targets": "out_proj", "rank": 4, "scale": 0.5}, LORA),
    "lora_x_proj": (LoRA, {"targets": "x_proj", "space": "weight", "rank": 3, "scale": 0.7}, LORA),
    "lora_x_proj_d_state4": (LoRA, {"targets": "x_proj", "space": "weight", "rank": 3, "scale": 0.7}, LORA),
    "lora_d": (LoRA, {"targets": "x_proj", "rows": "d", "space": "weight", "rank": 2, "scale": 0.5}, LORA),
    "lora_dt": (LoRA, {"targets": "dt_proj", "space": "weight", "rank": 3, "scale": 0.5}, LORA),
    "parallel_adapter": (ParallelAdapter, {"rank": 5, "scale": 0.5}, LORA),
    "addscan_prefix_copy": (
        AdditionalScan,
        {"states": 1},
        {"A_logs": "A_log_scan_addi", "x_proj_weight": "x_proj_scan_addi"},
    ),
    "affix_inner_dual_prefix_noproj": (Affix, {"tokens": 3}, {"table": "embedding.weight"}),
    "affix_inner_dual_prefix_proj": (
        Affix,
        {"tokens": 2, "projection": True, "hidden": 12},
        {
            "embedding": "embedding.weight",
            "fc1.weight": "transform.0.weight",
            "fc1.bias": "transform.0.bias",
            "fc2.weight": "transform.2.weight",
            "fc2.bias": "transform.2.bias",
        },
    ),
    "learnable_A_v2": (Offset, {"targets": "A_log"}, {"offset": "learnable_A_logs"}),
    "learnable_D_v2": (Offset, {"targets": "D"}, {"offset": "learnable_D"}),
    "learnable_bias_v2": (Offset, {"targets": "dt_bias"}, {"offset": "learnable_bias"}),
    "learnable_conv2d_v2": (Offset, {"targets": "conv"}, {"offset": "learnable_conv1d_weight"}),
}


def backbone(given: dict) -> VMamba:
    return VMamba(
        dims=given["dims"] if isinstance(given["dims"], int) else tuple(given["dims"]),
        depths=tuple(given["depths"]),
        d_state=given["ssm_d_state"],
        ssm_ratio=given["ssm_ratio"],
        mlp_ratio=given["mlp_ratio"],
        num_classes=0,
        drop_path_rate=0.0,
    ).double()


def theirs(name: str, endings: dict[str, str], given: set[str]) -> str:
    """The published code's name of one of our method's tensors."""
    ending = next(e for e in sorted(endings, key=len, reverse=True) if name.endswith(e))
    block = re.search(r"layers/\d+/blocks/\d+/", name)
    start = f"module.{block.group().replace('/', '.')}op." if block else "module.prefix_encoder."
    (found,) = (k for k in given if k.startswith(start) and endings[ending] in k)
    return found


def golden(case: str) -> tuple[AdaptedModel, dict[str, torch.Tensor], dict[str, torch.nn.Parameter]]:
    """A model with the published code's weights, what that code computes, and the trained tensors by its names."""
    kind, sizes, endings = CASES[case]
    content = dict(np.load(GOLDEN / f"{case}.npz"))
    config = json.loads(str(content.pop("config_json")))
    tensors = {key: torch.from_numpy(value) for key, value in content.items()}
    weights = {k.removeprefix("param/"): t.double() for k, t in tensors.items() if k.startswith("param/")}
    plain = backbone(config["module_kwargs"])
    own = {f"module.{key}" for key in plain.official_state(plain.state_dict())}
    official = {k.removeprefix("module."): t for k, t in weights.items() if k in own}
    load_state(plain, Checkpoint(official), case)
    model = adapt(plain, {"method": kind(**sizes)}, config["num_classes"]).eval()
    extra = {k for k in weights if k.startswith("module.") and k not in own}
    trained = {theirs(k, endings, extra): p for k, p in model.methods["method"].named_parameters()}
    assert trained.keys() == extra
    trained |= {f"head.{key}": p for key, p in model.backbone.head.named_parameters()}
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(weights[key].view_as(parameter))
    return model, tensors, trained


@pytest.mark.parametrize("case", CASES)
def test_values_of_the_published_code(case):
    model, expected, trained = golden(case)
    logits = model(expected["input"].double())
    assert (logits - expected["logits"]).abs().max() <= 1e-10
    loss = F.cross_entropy(logits, expected["labels"])
    assert abs(loss.item() - expected["loss"].item()) <= 1e-10
    wanted = {key.removeprefix("grad/"): t for key, t in expected.items() if key.startswith("grad/")}
    assert wanted.keys() == trained.keys()
    for key, gradient in zip(trained, torch.autograd.grad(loss, list(trained.values()))):
        assert (gradient - wanted[key].view_as(gradient)).abs().max() <= 1e-10, key


def tiny() -> VMamba:
    torch.manual_seed(0)
    return VMamba(dims=(16, 24), depths=(1, 2), mlp_ratio=2.0, num_classes=0, img_size=24).double().eval()


@pytest.mark.parametrize("form", ["state", "output"])
def test_every_direction_has_an_offset(form):
    """At zero it is the base model; each direction's own moves the output and gets a gradient."""
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    features = tiny()(images)
    model = adapt(tiny(), {"offset": StateOffset(form=form)}, 3).eval()
    found = model.backbone.forward_head(model.backbone.forward_features(images), pre_logits=True)
    assert torch.allclose(found, features, rtol=0, atol=1e-13)
    offsets = dict(model.methods["offset"].named_parameters())
    assert len(offsets) == 4 * 3
    assert {p.shape for p in offsets.values()} == ({(16, 1), (24, 1)} if form == "state" else {(16,), (24,)})
    map_ = model.backbone.forward_features(images)
    gradients = torch.autograd.grad(map_.square().mean(), list(offsets.values()))
    assert all(g.any() for g in gradients)


def test_affix_that_shares_its_tokens_and_what_has_no_place():
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    shared = Affix(tokens=2, directions="single")
    model = adapt(tiny(), {"affix": shared}, 3).eval()
    assert dict(shared.named_parameters())["sites.table"].shape == (2, 16 + 2 * 24)
    dual = Affix(tokens=2)
    other = adapt(tiny(), {"affix": dual}, 3).eval()
    with torch.no_grad():
        columns = shared.sites.table.split([16, 24, 24], dim=1)
        dual.sites.table.copy_(torch.cat([part for part in columns for _ in range(4)], dim=1))
    found, expected = (m.backbone.forward_features(images) for m in (model, other))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, tiny().forward_features(images))
    for sizes in ({"position": "infix"}, {"inner": False}):
        with pytest.raises(UserError, match="in front of each direction's sequence alone"):
            adapt(tiny(), {"affix": Affix(tokens=2, **sizes)}, 3)


def test_weights_of_a_file_load_and_export_under_official_names(tmp_path):
    model = tiny()
    state = model.official_state({**model.state_dict(), "head.weight": torch.zeros(1000, 24)})
    torch.save({"model": state}, tmp_path / "official.pth")
    other = VMamba(dims=(16, 24), depths=(1, 2), mlp_ratio=2.0, num_classes=0, img_size=24).double()
    load_weights(other, tmp_path / "official.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    adapted = adapt(other, {"probe": LinearProbe()}, 3)
    export_official(adapted.backbone, tmp_path / "out.safetensors")
    assert set(read_state_dict(tmp_path / "out.safetensors")) == {*state, "classifier.head.bias"}
