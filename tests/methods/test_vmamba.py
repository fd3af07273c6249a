"""Methods on VMamba against values of MambaPEFT's published code in float64: logits, loss and every gradient."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import PRESETS, methods_of
from hydra import compose, initialize_config_dir

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.vmamba import VMamba
from mambapeft_vision.backbones.weights import export_official, load_weights, read_state_dict
from mambapeft_vision.integrations.reference import load_reference
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.linear_probe import LinearProbe
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.state_offset import StateOffset
from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "vmamba"

CONFIGURATIONS = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    content = dict(np.load(GOLDEN / f"{name}.npz"))
    return json.loads(str(content.pop("config_json"))), content


def part_of(content: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in content.items()}
    return {k.removeprefix(f"{kind}/"): v for k, v in wide.items() if k.startswith(f"{kind}/")}


def reference(config: dict, state: dict, **changes):
    """`load_reference` of a configuration; changes: of its PEFT arguments, or with `module_` of its backbone's."""
    module = {k.removeprefix("module_"): v for k, v in changes.items() if k.startswith("module_")}
    peft = {k: v for k, v in changes.items() if not k.startswith("module_")}
    peft_kwargs = None if config["peft_kwargs"] is None else {**config["peft_kwargs"], **peft}
    module_kwargs = {**config["module_kwargs"], **module}
    return load_reference(peft_kwargs, module_kwargs, state, config["num_classes"], family="vmamba")


def test_every_configuration_is_here():
    assert len(CONFIGURATIONS) == 18


@pytest.mark.parametrize("kernel", ["torch", "naive"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_values_of_the_published_code(name, kernel):
    """Logits, loss and the gradient of every tensor that it trains."""
    config, content = golden(name)
    model, trained = reference(config, part_of(content, "param"))
    model.backbone.set_kernel(kernel, "cpu")
    logits = model(torch.from_numpy(content["input"]).double())
    assert logits.dtype == torch.float64
    assert np.abs(logits.detach().numpy() - content["logits"]).max() <= 1e-10
    loss = F.cross_entropy(logits, torch.from_numpy(content["labels"]))
    assert abs(loss.item() - content["loss"]) <= 1e-10
    loss.backward()
    wanted = part_of(content, "grad")
    assert wanted.keys() == trained.keys()
    for key, gradient in wanted.items():
        assert np.abs(trained[key].grad.numpy() - gradient).max() <= 1e-10, key
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}


def test_saved_files_hold_adapters_alone_and_the_backbone_comes_from_its_checkpoint():
    config, content = golden("lora_x_proj")
    params = part_of(content, "param")
    adapter = {k: v for k, v in params.items() if "lora" in k or k.startswith("head.")}
    plain = {k.removeprefix("module."): v for k, v in params.items() if k not in adapter}
    saved = {f"backbone.{k}": v for k, v in adapter.items() if not k.startswith("head.")}
    saved |= {k.replace("head.", "head.layers.head."): v for k, v in adapter.items() if k.startswith("head.")}
    plain |= {"classifier.head.weight": np.zeros((1000, 20)), "classifier.head.bias": np.zeros(1000)}
    arguments = config["peft_kwargs"], config["module_kwargs"], {"state_dict": saved}, config["num_classes"]
    model, _ = load_reference(*arguments, family="vmamba", backbone_state={"model": plain})
    found = model(torch.from_numpy(content["input"]).double()).detach().numpy()
    assert np.abs(found - content["logits"]).max() <= 1e-10
    with pytest.raises(UserError, match="holds no backbone"):
        load_reference(*arguments, family="vmamba")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora_in_proj", {"lora_X": True}, "take part in nothing.*lora_in_proj"),
        ("lora_in_proj", {"lora_Z": True}, "take part in nothing"),
        ("lora_in_proj", {"lora_patch_embed": True}, "does nothing"),
        ("lora_in_proj", {"prompt_tuning": True}, "no room for prompts"),
        ("lora_in_proj", {"learnable_cls_token_v2": True}, "no class token"),
        ("lora_in_proj", {"use_dora": True}, "not implemented there"),
        ("lora_in_proj", {"bit_in_proj": 8}, "bit_in_proj=8"),
        ("lora_in_proj", {"lora_Y": True}, "unknown argument.*lora_Y"),
        ("lora_in_proj", {"module_norm_layer": "ln"}, "take the width for channels"),
        ("lora_in_proj", {"module_forward_type": "v0"}, "'v05_noz' alone|downsample_version"),
        ("lora_dt", {"train_lora_dt": False}, "has no effect"),
        ("affix_inner_dual_prefix_noproj", {"prefix_type": "inner_single_prefix"}, "crashes on VMamba"),
        ("affix_inner_dual_prefix_noproj", {"prefix_type": "outer_dual_prefix"}, "refused by the reference"),
        ("addscan_prefix_copy", {"scan_A_copy_from_last": False}, "misspelt"),
        ("addscan_prefix_copy", {"zero_init_x_proj": True}, "never get a gradient"),
        ("lp", {"module_posembed": True}, "posembed=True"),
        ("lp", {"module_forward_type": "v2"}, "forward_type='v2'"),
        ("lp", {"module_gmlp": True}, "gmlp=True"),
        ("lp", {"module_depht": 3}, "no argument depht"),
    ],
)
def test_forms_that_are_wrong_there_are_refused_with_the_reason(name, changes, message):
    config, content = golden(name)
    with pytest.raises(UserError, match=message):
        reference(config, part_of(content, "param"), **changes)


def test_channel_last_is_the_same_function():
    config, content = golden("lora_x_proj")
    model, _ = reference(config, part_of(content, "param"), module_norm_layer="ln")
    found = model(torch.from_numpy(content["input"]).double()).detach().numpy()
    assert np.abs(found - content["logits"]).max() <= 1e-10


def test_tensors_that_are_trained_themselves():
    """Without `_v2` the backbone's own tensors are trained, the convolution's bias among them where there is one."""
    config, content = golden("lp")
    params = part_of(content, "param")
    switches = {f"learnable_{key}": True for key in ("A", "D", "conv1d", "bias")}
    _, trained = reference(config, params, **switches)
    op = "module.layers.0.blocks.0.op."
    found = {name.removeprefix(op) for name in trained if name.startswith(op)}
    assert found == {"A_logs", "Ds", "conv2d.weight", "dt_projs_bias"}
    for name in [n for n in params if n.endswith("conv2d.weight")]:
        params[name.replace("weight", "bias")] = np.zeros(len(params[name]))
    model, trained = reference(config, params, module_ssm_conv_bias=True, **switches)
    assert f"{op}conv2d.bias" in trained
    logits = model(torch.from_numpy(content["input"]).double()).detach().numpy()
    assert np.abs(logits - content["logits"]).max() <= 1e-10


def test_everything_at_once():
    """Each switch's tensors are found under its names, and each gets a gradient."""
    config, content = golden("lp")
    switches: dict = {f"lora_{key}": True for key in ("in_proj", "out_proj", "d", "B", "C", "dt")}
    switches |= {f"learnable_{key}{v}": True for key in ("A", "D", "conv1d", "bias") for v in ("", "_v2")}
    switches |= {"adaptformer": True, "prefix_tuning": True, "prefix_type": "inner_dual_prefix"}
    switches |= {"additional_scan": True, "scan_A_copy_from_last": True, "scan_addition_num": 2}
    params = part_of(content, "param")
    with pytest.raises(UserError, match="does not fit") as error:
        reference(config, params, **switches)
    assert "missing: module." in str(error.value)
    generator = np.random.default_rng(0)
    for s, block, dim in ((0, 0, 6), (1, 0, 10), (2, 0, 14), (2, 1, 14), (3, 0, 20)):
        inner, rank, op = 2 * dim, -(-dim // 16), f"module.layers.{s}.blocks.{block}.op."
        shapes = {
            "learnable_A_logs": (4 * inner, 1),
            "learnable_D": (4 * inner,),
            "learnable_conv1d_weight": (inner, 1, 3, 3),
            "learnable_bias": (4, inner),
            "A_log_scan_addi": (4 * inner, 2),
            "x_proj_scan_addi": (4, 4, inner),
        }
        for name, out, into in (("lora_in_proj", inner, dim), ("lora_out_proj", dim, inner), ("adaptf", dim, inner)):
            shapes |= {f"{name}.adapter_down.weight": (32, into), f"{name}.adapter_up.weight": (out, 32)}
        for name, out, into in (("d", rank, inner), ("B", 1, inner), ("C", 1, inner), ("dt", inner, rank)):
            shapes |= {f"lora_{name}.adapter_down_weight": (4, 4, into), f"lora_{name}.adapter_up_weight": (4, out, 4)}
        params |= {op + name: 0.1 * generator.standard_normal(shape) for name, shape in shapes.items()}
    columns, mean, largest = 4 * 2 * (6 + 10 + 14 + 14 + 20), 2 * (6 + 10 + 14 + 20) // 4, 40
    shapes = {"embedding.weight": (1, mean), "transform.0.weight": (largest, mean), "transform.0.bias": (largest,)}
    shapes |= {"transform.2.weight": (columns, largest), "transform.2.bias": (columns,)}
    params |= {f"module.prefix_encoder.{k}": 0.1 * generator.standard_normal(shape) for k, shape in shapes.items()}
    model, trained = reference(config, params, **switches)
    F.cross_entropy(model(torch.from_numpy(content["input"]).double()), torch.from_numpy(content["labels"])).backward()
    assert trained.keys() == params.keys() - {k for k in part_of(content, "param") if not k.startswith("head.")}
    assert all(p.grad.any() for p in trained.values())


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


def test_a_merged_affix_costs_the_scans_an_initial_state_alone(monkeypatch):
    """The tokens stay attached and saved; what they leave is computed once."""
    torch.manual_seed(0)
    backbone = VMamba(dims=(4, 6), depths=(1, 1), num_classes=0, img_size=16).double()
    model = adapt(backbone, {"affix": Affix(tokens=2, position="prefix", directions="dual", projection=True)}, 3)
    for parameter in model.head_parameters().values():
        torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model.eval()(images)
    assert list(model.merge()) == ["affix"]
    monkeypatch.setattr("mambapeft_vision.backbones.vmamba.prefix_states", None)  # nobody calls it any more
    assert torch.allclose(model(images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_a_training_trajectory_is_the_same_on_every_kernel(kernel):
    """Steps of AdamW with drop path, LoRA's dropout and an affix, in float64."""

    def losses(kernel: str) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        backbone = VMamba(dims=(4, 6), depths=(1, 2), num_classes=0, img_size=16, drop_path_rate=0.3).double()
        methods = {
            "lora": LoRA(targets="in_proj", rank=2, scale=1.0, dropout=0.1),
            "rows": LoRA(targets="x_proj", rank=1, scale=1.0, space="weight"),
            "affix": Affix(tokens=1, position="prefix", directions="dual"),
        }
        model = adapt(backbone, methods, 3).train()
        backbone.set_kernel(kernel, "cpu")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.arange(6) % 3
        found = []
        for step in range(4):
            torch.manual_seed(step)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    (expected, weights), (found, trained) = losses("naive"), losses(kernel)
    assert expected[-1] < expected[0]
    assert np.abs(np.subtract(found, expected)).max() <= 1e-10
    assert (trained - weights).abs().max() <= 1e-9


@pytest.mark.parametrize("backbone", ["vmamba_s", "vmamba_b"])
def test_published_presets_do_not_clip(backbone):
    def clip_norm(*overrides: str) -> float | None:
        with initialize_config_dir(str(configs_folder()), version_base="1.3"):
            return compose("train", [f"backbone={backbone}", *overrides]).trainer.clip_norm

    register_schemas()
    assert clip_norm("method=lora_in_proj") is None
    assert clip_norm("method=lora_in_proj", "trainer.clip_norm=3") == 3


@pytest.mark.parametrize(
    ("backbone", "preset", "count"),
    [
        ("vmamba_small_s2l15", "lora_in_proj", 1_511_424),
        ("vmamba_base_s2l15", "lora_in_proj", 503_808),
        ("vmamba_small_s2l15", "additional_scan", 188_928),
        ("vmamba_base_s2l15", "additional_scan", 251_904),
        ("vmamba_small_s2l15", "affix_wo_proj", 188_928),
        ("vmamba_base_s2l15", "affix_wo_proj", 251_904),
    ],
)
def test_published_presets_train_as_many_parameters(backbone, preset, count):
    specs = PRESETS[preset].methods_on(backbone)
    with torch.device("meta"):
        model = adapt(create_backbone(backbone, "random"), methods_of(specs), 100)
    assert model.counts()["trainable"] == count
    (spec,) = specs.values()
    expected = {"lora_in_proj": ("scale", 1), "additional_scan": ("states", 1), "affix_wo_proj": ("tokens", 3)}
    key, value = expected[preset]
    assert spec[key] == value
    rate = {"vmamba_small_s2l15": 0.3, "vmamba_base_s2l15": 0.6}[backbone]
    assert model.backbone.architecture["drop_path_rate"] == rate
