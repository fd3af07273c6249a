"""Mamba-Reg, VideoMamba and ARM against what their published codes compute, and their official key lists."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.golden_values import GOLDEN

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.integrations.reference import load_reference
from mambapeft_vision.utils.errors import UserError

FOLDER = GOLDEN / "backbones"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz") if not path.stem.startswith("svp"))  # a method, no backbone
TOLERANCE = 1e-10
# Registered name → the list of its official keys with 1000 classes, and its parameters without the head.
OFFICIAL = {
    "mambareg_small_patch16_224": ("mambareg_small", 25_496_064),
    "mambareg_base_patch16_224": ("mambareg_base", 96_996_096),
    "mambareg_large_patch16_224": ("mambareg_large", 339_173_376),
    "videomamba_tiny_patch16_224": ("videomamba_tiny", 6_955_008),
    "videomamba_small_patch16_224": ("videomamba_small", 25_411_584),
    "videomamba_middle_patch16_224": ("videomamba_middle", 73_640_448),
    "videomamba_middle_patch16_448": ("videomamba_middle_448", 73_640_448 + 338_688),
    "videomamba_middle_patch16_576": ("videomamba_middle_576", 73_640_448 + 633_600),
    "arm_base_patch16_224": ("arm_base", 84_262_656),
    "arm_large_patch16_224": ("arm_large", 296_010_720),
    "arm_huge_patch16_224": ("arm_huge", 661_145_088),
}


def read(name: str) -> dict:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file}
    groups = {
        group: {
            key.removeprefix(f"{group}/"): torch.from_numpy(a) for key, a in arrays.items() if key.startswith(group)
        }
        for group in ("param", "grad", "checkpoint")
    }
    return {**groups, "config": json.loads(str(arrays["config_json"])), **arrays}


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    scale = np.abs(theirs).max()
    return float(np.abs(ours.detach().numpy() - theirs).max() / (scale or 1.0))


def reference(golden: dict, **change):
    config = golden["config"]
    kwargs = {**config["module_kwargs"], **change}
    return load_reference(None, kwargs, golden["param"], config["num_classes"], family=config["family"])


def test_all_golden_files_are_here():
    assert len(NAMES) == 8


@pytest.mark.parametrize("kernel", ["torch", "naive"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_every_gradient(name, kernel):
    golden = read(name)
    model, names = reference(golden)
    model.backbone.set_kernel(kernel, "cpu")
    images, labels = torch.from_numpy(golden["input"]), torch.from_numpy(golden["labels"])
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert relative(logits, golden["logits"]) < TOLERANCE
    assert abs(loss.item() - golden["loss"]) < TOLERANCE * golden["loss"]
    assert set(names) == set(golden["grad"])
    for key, gradient in golden["grad"].items():
        assert relative(names[key].grad, gradient.numpy()) < TOLERANCE, key
    backbone = model.backbone
    feature = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    assert relative(feature, golden["feature"]) < TOLERANCE
    assert list(backbone.state_dict()) == list(golden["param"])


def test_gradients_that_are_zero_by_construction_are_exactly_zero():
    """VideoMamba's forward direction sees nothing but the class token where only that is read."""
    golden = read("videomamba")
    model, names = reference(golden)
    F.cross_entropy(model(torch.from_numpy(golden["input"])), torch.from_numpy(golden["labels"])).backward()
    last = "layers.2.mixer"
    assert not names[f"{last}.A_log"].grad.any()
    taps = names[f"{last}.conv1d.weight"].grad
    assert not taps[..., :3].any() and taps[..., 3].all()
    assert names[f"{last}.A_b_log"].grad.all()


@pytest.mark.parametrize("name", OFFICIAL)
def test_keys_and_shapes_are_the_official_ones_in_order(name):
    file, parameters = OFFICIAL[name]
    keys = json.loads((FOLDER / f"{file}_keys.json").read_text())["keys"]
    if file.endswith(("_448", "_576")):  # these list what differs from the smaller images' model
        keys = json.loads((FOLDER / "videomamba_middle_keys.json").read_text())["keys"] | keys
    with torch.device("meta"):
        model = timm.create_model(name)
    state = model.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == keys
    assert list(state) == list(keys)
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head.")) == parameters


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mambareg_12", {"rms_norm": False}, "rms_norm=False"),
        ("mambareg_12", {"num_cls_tokens": 16}, "fewer tokens than patches"),
        ("mambareg_12", {"cls_reduce": 5}, "divides both"),
        ("mambareg_12", {"nope": 1}, "no argument nope"),
        ("videomamba", {"ssm_cfg": {"nope": 1}}, "ssm_cfg has nope"),
        ("arm", {"bimamba_type": "v2"}, "only 'v3' is supported"),
    ],
)
def test_unsupported_arguments_are_refused(name, change, message):
    with pytest.raises(UserError, match=message):
        reference(read(name), **change)


def test_unknown_families_and_peft_arguments_are_refused():
    golden = read("videomamba")
    kwargs, params = golden["config"]["module_kwargs"], golden["param"]
    known = "vim, vmamba, svp, mambareg, videomamba, arm"
    with pytest.raises(UserError, match=f"family='vmambo' is unknown; known: {known}"):
        load_reference(None, kwargs, params, 10, family="vmambo")
    with pytest.raises(UserError, match="the published code of videomamba has none"):
        load_reference({"lora_X": True}, kwargs, params, 10, family="videomamba")


# ---------------------------------------------------------------------------------------------------------------
# Against a second, dense implementation, where the references cannot run: rectangles, odd numbers of patches


def scan(u, mixer, suffix):
    """One direction of a mixer on [L, E], token by token."""
    conv, x_proj, dt_proj = (getattr(mixer, f"{part}{suffix}") for part in ("conv1d", "x_proj", "dt_proj"))
    A, D = -getattr(mixer, f"A{suffix}_log").exp(), getattr(mixer, f"D{suffix}")
    taps, rank, states = conv.weight[:, 0], mixer.dt_rank, A.shape[1]
    padded = torch.cat((u.new_zeros(taps.shape[1] - 1, u.shape[1]), u))
    h, out = torch.zeros_like(A), []
    for t in range(len(u)):
        v = F.silu((padded[t : t + taps.shape[1]].T * taps).sum(1) + conv.bias)
        dt, B, C = (x_proj.weight @ v).split((rank, states, states))
        delta = F.softplus(dt_proj.weight @ dt + dt_proj.bias)
        h = torch.exp(delta[:, None] * A) * h + (delta * v)[:, None] * B
        out.append(h @ C + D * v)
    return torch.stack(out)


def arm_mixer(mixer, tokens, grid, class_index):
    """[L, D] → [L, D], with the column order written out place by place."""
    rows, columns = grid
    x, z = F.linear(tokens, mixer.in_proj.weight).chunk(2, dim=1)
    places = [i for i in range(len(tokens)) if i != class_index]
    order = list(range(len(tokens)))
    for j in range(columns):
        for i in range(rows):
            order[places[j * rows + i]] = places[i * columns + j]
    total = scan(x, mixer, "") + scan(x.flip(0), mixer, "_b").flip(0)
    across = scan(x[order], mixer, "_c") + scan(x[order].flip(0), mixer, "_c_b").flip(0)
    total = total.index_add(0, torch.tensor(order), across)
    return F.linear(F.silu(z) * total / 4, mixer.out_proj.weight)


@pytest.mark.parametrize(("size", "grid"), [((24, 40), (3, 5)), ((16, 32), (2, 4)), ((40, 8), (5, 1))])
def test_arm_on_rectangles_and_odd_numbers_of_patches(size, grid):
    torch.manual_seed(0)
    model = create_backbone("arm_pico_patch8_32", "random", img_size=size, embed_dim=16, depth=1).double().eval()
    tokens, layout = model.embed(torch.randn(2, 3, *size, dtype=torch.float64))
    assert layout.grid == grid
    (middle,) = layout.special
    block = model.layers[0]
    out, _ = block(tokens, layout)
    for sample, result in zip(tokens, out):
        x = sample + arm_mixer(block.mixer, block.norm1(sample), grid, middle)
        h, mlp = block.norm2(x), block.mlp
        x = x + F.linear(F.silu(mlp.w1(h)) * mlp.w2(h), mlp.w3.weight, mlp.w3.bias)
        torch.testing.assert_close(result, x, rtol=1e-10, atol=1e-12)
    normed = model.norm_f(out)
    feature = (normed[:, :middle].mean(1) + normed[:, middle + 1 :].mean(1)) / 2
    torch.testing.assert_close(model.pool(normed, layout), feature)


@pytest.mark.parametrize("size", [(24, 40), (32, 32), (56, 16)])
def test_registers_stand_behind_equal_runs_of_patches(size):
    model = create_backbone("mambareg_pico_patch8_32", "random", img_size=size).double().eval()
    patches = model.patch_embed(torch.zeros(1, 3, *size, dtype=torch.float64)) + model.pos_embed
    tokens, layout = model.embed(torch.zeros(1, 3, *size, dtype=torch.float64))
    n, run = 4, patches.shape[1] // 5
    assert layout.special == tuple((k + 1) * run + k for k in range(n))
    assert torch.equal(tokens[:, list(layout.special)], model.cls_token + model.pos_embed_cls)
    assert torch.equal(tokens[:, list(layout.patches)], patches)


# ---------------------------------------------------------------------------------------------------------------
# Initialisation


def test_videomamba_starts_as_its_code_does():
    model = create_backbone("videomamba_pico_patch8_32", "random", depth=16)
    mixer = model.layers[0].mixer
    assert not model.cls_token.any()
    for linear in (mixer.in_proj, mixer.x_proj, mixer.x_proj_b, mixer.dt_proj, mixer.dt_proj_b):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert linear.bias is None or not linear.bias.any()
    bound = 1 / math.sqrt(mixer.d_inner) / 4  # Kaiming-uniform, over sqrt(depth)
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["mambareg_pico_patch8_32", "arm_pico_patch8_32", "vim_pico_patch8_32"])
@pytest.mark.parametrize("how", [None, "zero", "drawn"])
def test_further_directions_start_as_the_code_or_as_the_first(name, how):
    model = create_backbone(name, "random", **({} if how is None else {"further_dt_bias": how}))
    how = how or ("drawn" if name.startswith("vim") else "zero")
    for mixer in model.mixers:
        assert F.softplus(mixer.dt_proj.bias).max() <= 0.1 + 1e-6
        for suffix in mixer.suffixes[1:]:
            bias = getattr(mixer, f"dt_proj{suffix}").bias
            assert not bias.any() if how == "zero" else F.softplus(bias).max() <= 0.1 + 1e-6
    with pytest.raises(UserError, match="expected 'drawn' or 'zero'"):
        create_backbone(name, "random", further_dt_bias="none")


def test_mambareg_and_arm_draw_what_vim_does_not_have():
    registers = create_backbone("mambareg_pico_patch8_32", "random", embed_dim=192, num_cls_tokens=12)
    for tensor in (registers.cls_token, registers.pos_embed_cls, registers.pos_embed, registers.neck.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(registers.norm_neck.weight, torch.ones(12 * 48))
    arm = create_backbone("arm_pico_patch8_32", "random")
    for linear in (arm.layers[0].mlp.w1, arm.layers[0].mlp.w3):
        assert not linear.bias.any() and linear.weight.any()
