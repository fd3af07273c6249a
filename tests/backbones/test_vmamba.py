"""VMamba against values of the published code in float64, its official key lists, and its own promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from mambapeft_kernels import layer_norm
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay

from mambapeft_vision.backbones import layers, vmamba
from mambapeft_vision.backbones import weights as weights_module
from mambapeft_vision.backbones.layers import Mlp, PortedConv2d
from mambapeft_vision.backbones.ports import FunctionBranch, taken_ports
from mambapeft_vision.backbones.vmamba import OFFICIAL_SIZES, VMamba
from mambapeft_vision.backbones.weights import Checkpoint, load_state
from mambapeft_vision.utils.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "vmamba"
KEYS = {
    "vmamba_tiny_s1l8": ("vmamba_t_keys", 30_249_064),
    "vmamba_small_s2l15": ("vmamba_s_keys", 50_147_752),
    "vmamba_base_s2l15": ("vmamba_b_keys", 88_557_800),
    "vmamba_tiny_s2l5": ("vmamba_t_s2l5_keys", 30_705_832),
    "vmamba_small_s1l20": ("vmamba_s_s1l20_keys", 49_012_840),
    "vmamba_base_s1l20": ("vmamba_b_s1l20_keys", 86_614_504),
    "vmamba_vanilla_tiny": ("vanilla_t_keys", 22_893_448),
    "vmamba_vanilla_small": ("vanilla_s_keys", 44_417_416),
    "vmamba_vanilla_base": ("vanilla_b_keys", 76_254_056),
}


def tiny(seed: int = 0, **kwargs) -> VMamba:
    """A small model with random weights, its head's too, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"dims": (6, 8, 10, 12), "depths": (1, 1, 2, 1), "mlp_ratio": 2.0, "num_classes": 5, "img_size": 40}
    model = VMamba(**{**sizes, **kwargs})
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    return model.double().eval()


def golden(name: str) -> tuple[VMamba, dict]:
    """A model with the published code's weights, and what that code computes with it."""
    content = dict(np.load(GOLDEN / f"{name}.npz"))
    config = json.loads(str(content.pop("config_json")))
    given = config["module_kwargs"]
    model = VMamba(
        dims=given["dims"] if isinstance(given["dims"], int) else tuple(given["dims"]),
        depths=tuple(given["depths"]),
        d_state=given["ssm_d_state"],
        ssm_ratio=given["ssm_ratio"],
        mlp_ratio=given["mlp_ratio"],
        vanilla=given["forward_type"] == "v0",
        num_classes=config["num_classes"],
        drop_path_rate=given["drop_path_rate"],
    ).double()
    tensors = {key: torch.from_numpy(value) for key, value in content.items()}
    weights = {key.removeprefix("param/"): t.double() for key, t in tensors.items() if key.startswith("param/")}
    load_state(model, Checkpoint(weights), name, with_head=True)
    return model.eval(), tensors


@pytest.mark.parametrize("kernel", ["torch", "naive"])
@pytest.mark.parametrize("name", ["plain_s2", "plain_s1_rectangle", "plain_v0"])
def test_values_of_the_published_code(name, kernel):
    """Features, logits, loss and the gradient of every parameter, to 1e-10."""
    model, expected = golden(name)
    model.set_kernel(kernel, "cpu")
    images, labels = expected["input"].double(), expected["labels"]
    features = model.forward_features(images)
    assert torch.allclose(model.forward_head(features, pre_logits=True), expected["feature"], rtol=0, atol=1e-10)
    logits = model.forward_head(features)
    assert torch.allclose(logits, expected["logits"], rtol=0, atol=1e-10)
    loss = F.cross_entropy(logits, labels)
    assert abs(loss.item() - expected["loss"].item()) <= 1e-10
    names, parameters = zip(*model.named_parameters())
    found = model.official_state(dict(zip(names, torch.autograd.grad(loss, parameters))))
    wanted = {key.removeprefix("grad/"): t for key, t in expected.items() if key.startswith("grad/")}
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        assert (gradient - wanted[key]).abs().max() <= 1e-10, key


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_shapes_are_the_official_ones_in_order(name):
    file, count = KEYS[name]
    listed = json.loads((GOLDEN / f"{file}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = timm.create_model(name)
    state = model.official_state(model.state_dict())
    assert {key: list(t.shape) for key, t in state.items()} == listed["keys"]
    assert list(state) == list(listed["keys"])
    assert sum(p.numel() for p in model.parameters()) == listed["n_params"] == count


def test_every_registered_variant_has_its_sizes():
    own = {"vmamba_pico_patch4_32", "vmamba_nano_patch4_64"}
    assert set(KEYS) == set(OFFICIAL_SIZES) == set(timm.list_models(module="vmamba")) - own


def test_old_names_and_four_dimensional_linear_weights_load():
    model = tiny()
    state = model.official_state(model.state_dict())
    old = {}
    for name, tensor in state.items():
        if name.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "head.weight")):
            tensor = tensor[..., None, None]
        for new, before in ((".norm.", ".ln_1."), (".op.", ".self_attention.")):
            name = name.replace(new, before) if name.startswith("layers.") else name
        name = name.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")
        old[name.removeprefix("classifier.")] = tensor
    assert old.keys() != state.keys()
    other = tiny(seed=1)
    load_state(other, Checkpoint(old), "old", with_head=True)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


def test_the_file_of_another_variant_is_named():
    with torch.device("meta"):
        one, two = (timm.create_model(name) for name in ("vmamba_tiny_s1l8", "vmamba_tiny_s2l5"))
    with pytest.raises(UserError, match=r"those of vmamba_tiny_s1l8: .* \(96, 96, 1, .* expected \(96, 192"):
        two.convert_checkpoint(one.official_state(one.state_dict()))
    with pytest.raises(UserError, match="no published variant's"):
        two.convert_checkpoint(tiny().state_dict())


@pytest.mark.parametrize("size", [(40, 56), (33, 65), (4, 4)], ids=str)
def test_any_size_of_images(size):
    model = tiny(img_size=size)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    features = model.forward_features(images)
    rows, columns = model.output_layout().grid
    assert features.shape == (2, rows * columns, model.num_features)
    assert torch.equal(model(images), model.forward_head(features))
    assert tiny()(images).shape == (2, 5)  # whatever size it was made for


@pytest.mark.parametrize("vanilla", [False, True])
def test_maps_are_read_in_four_directions(vanilla):
    """A transposed or turned image gives other features: the directions have weights of their own."""
    model = tiny(vanilla=vanilla)
    images = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    plain = model(images)
    assert not torch.allclose(model(images.mT), plain)
    assert not torch.allclose(model(images.flip(-1)), plain)


def test_drop_path_rates_start_at_zero():
    model = tiny(drop_path_rate=0.5)
    rates = [0, 0.125, 0.25, 0.375, 0.5]
    assert (1 - model.branch_scales.keep).tolist() == pytest.approx(
        [rate for rate in rates for _ in range(2)], abs=1e-6
    )
    assert model.branch_scales(4) is None
    scales = model.train().branch_scales(2000)
    assert torch.equal(scales[:2], torch.ones_like(scales[:2]))
    assert set(scales[-1].unique().tolist()) == {0.0, 2.0}
    assert scales[-1].mean().item() == pytest.approx(1, abs=0.1)
    assert not torch.equal(scales[-1], scales[-2])


def test_dropped_branches_leave_the_residual():
    """With everything dropped a block is the identity."""
    block = tiny().blocks[0]
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    none = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(block(vmamba.Stream(x), none, none).total(), x)
    assert not torch.allclose(block(vmamba.Stream(x), None, None).total(), x)


def test_initialisation_is_vmambas():
    torch.manual_seed(0)
    model = VMamba(dims=32, depths=(1, 1), d_state=3, num_classes=50)
    op = model.mixers[0]
    assert torch.allclose(op.A_logs.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(128, 3))
    assert torch.equal(op.Ds, torch.ones(128))
    dt = F.softplus(op.dt_projs_bias)
    assert 0.001 * 0.99 <= dt.min() <= dt.max() <= 0.1 * 1.01
    assert op.x_proj_weight.abs().max() <= 32**-0.5
    assert op.dt_projs_weight.abs().max() <= 2**-0.5
    for linear in (op.in_proj, op.out_proj, model.blocks[0].mlp.fc1):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.head.weight.any()
    assert not model.head.bias.any()


def test_roles_name_parameters_of_every_block():
    for model in (tiny(), tiny(vanilla=True, mlp_ratio=0.0)):
        parameters = dict(model.named_parameters())
        named = [name for names in model.roles.values() for name in names]
        assert set(named) <= set(parameters)
        for role, names in model.roles.items():
            assert len(names) == {"patch_embed": 1 if model.mixers[0].gated else 2}.get(role, len(names))
            if role not in ("patch_embed", "norm"):
                assert len(names) == len(model.blocks)
    biases = [n for n in parameters if "norm" in n and n.endswith("bias")]
    assert set(biases) <= set(model.roles["norm"])
    assert "mlp_up" not in model.roles


def test_row_blocks_are_exact():
    model = tiny(d_state=3)
    name = "layers.0.blocks.0.op."
    assert model.row_blocks(f"{name}x_proj_weight") == {"d": slice(0, 1), "b": slice(1, 4), "c": slice(4, 7)}
    assert model.row_blocks(f"{name}in_proj.weight") == {"x": slice(0, 6)}
    assert model.row_blocks("layers.0.blocks.0.mlp.fc1.weight") == {}
    gated = tiny(vanilla=True)
    assert gated.row_blocks(f"{name}in_proj.weight") == {"x": slice(0, 6), "z": slice(6, 12)}


def test_what_vmamba_has_no_place_for_is_refused_with_the_reason():
    model = tiny()
    with pytest.raises(UserError, match="no room for other tokens"):
        model.prompt.set("Prompt", lambda *_: None)
    with pytest.raises(UserError, match="no gate"):
        model.mixers[0].gate.set("Memba", lambda z: z)
    tiny(vanilla=True).mixers[0].gate.set("Memba", lambda z: z)
    model.blocks[0].input.set("Prompt", lambda tokens, layout: (torch.cat([tokens, tokens], 1), layout))
    with pytest.raises(UserError, match="from 100 to 200"):
        model(torch.randn(1, 3, 40, 40, dtype=torch.float64))
    assert taken_ports(model) == ["layers.0.blocks.0.input"]


def test_ports_of_a_mixer():
    """Offsets that are zero change nothing, others do; so do tokens in front of the sequences."""
    model = tiny(d_state=2)
    op, h = model.mixers[0], torch.randn(2, 3, 4, 6, dtype=torch.float64)
    plain = op(h)
    zeros = [torch.zeros(6, 2, dtype=torch.float64)] * 4
    op.state_offset.set("a", lambda: zeros)
    op.output_offset.set("b", lambda: [t[:, 0] for t in zeros])
    assert torch.equal(op(h), plain)
    for port, offset in ((op.state_offset, torch.randn(6, 2)), (op.output_offset, torch.randn(6))):
        four = [offset.double(), *[torch.zeros_like(offset).double()] * 3]
        value, port.value = port.value, lambda four=four: four
        assert not torch.allclose(op(h), plain)
        port.value = value
    op.affix.set("c", lambda: torch.zeros(4, 3, 6, dtype=torch.float64))
    assert torch.allclose(op(h), plain, rtol=0, atol=1e-15)  # tokens of zeros leave no state
    op.affix.value = lambda: torch.ones(4, 3, 6, dtype=torch.float64)
    assert not torch.allclose(op(h), plain)


def test_block_ports_see_the_map_row_by_row():
    model, images, seen = tiny(), torch.randn(1, 3, 40, 56, dtype=torch.float64), []
    expected = model(images)

    def see(tokens, layout):
        seen.append((tokens.shape, layout.grid))
        return tokens, layout

    model.blocks[1].input.set("a", see)
    model.blocks[1].tap.add("b", see)
    assert torch.allclose(model(images), expected, rtol=0, atol=1e-12)
    assert seen == [((1, 35, 8), (5, 7))] * 2
    model.blocks[1].input.value = lambda tokens, layout: (tokens + 1, layout)
    assert not torch.allclose(model(images), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_convolutions_keep_no_input_and_have_pytorchs_derivatives(memory_format):
    torch.manual_seed(0)
    conv = PortedConv2d(4, 6, 3, 2, padding=1).double().requires_grad_(False)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64).to(memory_format=memory_format)
    kept, found = [], []
    for run in (conv, lambda x: F.conv2d(x, conv.weight, conv.bias, 2, 1)):
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            out = run(leaf)
        (first,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
        found.append([out, first, *torch.autograd.grad(first.square().sum(), leaf)])
        found.append(torch.autograd.grad(run(leaf).sin().sum(), leaf))
    assert kept == [conv.weight.shape, x.shape, conv.weight.shape]  # ours, and PyTorch's
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-12, atol=1e-12)
    assert found[1][0].is_contiguous(memory_format=memory_format)


def test_narrow_frozen_mlps_compute_their_hidden_layer_again(monkeypatch):
    """Where fused kernels run under autocast; not where a weight trains, a branch joins or maps are wide."""
    calls = []

    def counted(x, weight, bias, kernel):
        calls.append(kernel)
        assert {t.dtype for t in (x, weight, bias)} == {torch.bfloat16}  # it computes without autocast
        return F.gelu(F.linear(x, weight, bias))

    monkeypatch.setattr(layers, "gelu_of_frozen_linear", counted)
    monkeypatch.setattr(layers, "gelu", lambda x, kernel: F.gelu(x))
    narrow, wide, trained, beside = (Mlp(d, 8, name="mlp").requires_grad_(False) for d in (4, 129, 4, 4))
    trained.fc1.weight.requires_grad_()
    beside.fc1.side.add(FunctionBranch("owner", lambda x: x.new_zeros(1)))
    for mlp, times in ((narrow, 1), (wide, 0), (trained, 0), (beside, 0)):
        mlp.kernel = "triton"
        x = torch.randn(3, mlp.fc1.in_features, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = mlp(x)
            assert len(calls) == times and torch.equal(out, mlp.fc2(F.gelu(mlp.fc1(x))))
        calls.clear()
        mlp(x)
        assert not calls
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # where nothing is kept, the product applies GELU
            mlp(x)
        assert len(calls) == (mlp is not beside)
        calls.clear()


def test_a_frozen_stem_begins_with_one_launch(monkeypatch):
    """Where fused kernels run under autocast; not where a part of it trains, is hooked, or float32 is asked for."""
    calls = []

    def counted(*given):
        calls.append(given[-1])
        return conv_norm_gelu(*given[:-1], "naive")

    conv_norm_gelu = vmamba.conv_norm_gelu
    monkeypatch.setattr(vmamba, "conv_norm_gelu", counted)
    images = torch.randn(2, 3, 10, 14)

    def launches(change=lambda stem: None, half: bool = True, kernel: str = "triton") -> int:
        calls.clear()
        stem = tiny().float().requires_grad_(False).patch_embed
        plain = stem(images)
        change(stem)
        with monkeypatch.context() as patch:
            # No such kernels here.
            patch.setattr(vmamba, "layer_norm", lambda *given: layer_norm(*given[:4], "torch", given[5]))
            for module in stem.modules():
                module.kernel = kernel
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = stem(images)
        assert (out.float() - plain).norm() < 2e-2 * plain.norm()
        return len(calls)

    assert launches() == 1
    assert launches(half=False) == launches(kernel="torch") == 0
    assert launches(lambda stem: stem["2"].bias.requires_grad_()) == 0
    assert launches(lambda stem: stem["0"].register_forward_hook(lambda *_: None)) == 0


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_fused_kernels_round_sums_in_inference_alone(monkeypatch, kernel):
    rounded = []
    plainly = vmamba.add_layer_norm
    monkeypatch.setattr(
        vmamba, "add_layer_norm", lambda *given: rounded.append(given[-1]) or plainly(*given[:-2], "torch")
    )
    norm = vmamba.Norm(4)
    norm.kernel = kernel
    hidden = torch.randn(2, 3, 3, 4)
    vmamba.add_norm(norm, hidden, None, None)
    with torch.no_grad():
        vmamba.add_norm(norm, hidden, None, None)
    assert rounded == [False, kernel == "triton"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, which is not here")
@pytest.mark.parametrize("batch", [5, 16, 32])
def test_an_evaluation_repeats_bit_for_bit_on_a_gpu(batch):
    """As wide as VMamba-S: its scans are cut into segments that depend on the number of images."""
    torch.manual_seed(0)
    model = VMamba(224, dims=(96, 192), depths=(1, 1), ssm_ratio=2.0, num_classes=0).cuda().eval()
    model.set_kernel("auto", "cuda")
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        first = model.forward_features(images)
        assert all(torch.equal(model.forward_features(images), first) for _ in range(5))
        alone = model.forward_features(images[:1])
    assert (alone - first[:1]).float().norm() < 2e-2 * first[:1].float().norm()


def test_the_head_is_replaced_by_a_zero_one():
    model = tiny(num_classes=0)
    images = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
    model.reset_classifier(7)
    assert model.get_classifier() is model.head
    assert torch.equal(model(images), torch.zeros(1, 7, dtype=torch.float64))


def test_intermediate_features_are_those_of_the_stages():
    """Maps before each downsampling; the last one, with the norm, is what the head reads."""
    model, images = tiny(), torch.randn(2, 3, 40, 56, dtype=torch.float64)
    final, maps = model.forward_intermediates(images, norm=True)
    assert [m.shape[1:] for m in maps] == [(6, 10, 14), (8, 5, 7), (10, 3, 4), (12, 2, 2)]
    assert [info["num_chs"] for info in model.feature_info] == [6, 8, 10, 12]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), final)
    assert torch.equal(final, model.forward_features(images))
    state, _ = model.run_blocks(*model.embed(images), stop=1)
    assert torch.equal(maps[0].flatten(2).transpose(1, 2), state.hidden + state.residual)
    early = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[1])


def test_features_only_leaves_out_later_stages():
    torch.manual_seed(0)
    model = timm.create_model("vmamba_pico_patch4_32", features_only=True, out_indices=(0,))
    assert [info["module"] for info in model.feature_info.info] == ["layers.0"]
    assert not any(name.startswith("model.layers.1") or "downsample" in name for name, _ in model.named_parameters())
    (found,) = model(torch.randn(1, 3, 32, 48))
    assert found.shape == (1, 32, 8, 12)


@pytest.mark.parametrize("coarse", [True, False])
def test_groups_of_layers_run_from_the_input_to_the_norm(coarse):
    model = tiny()
    groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    stem, first, last = (groups[n] for n in ("patch_embed.0.weight", "layers.0.blocks.0.norm.weight", "norm.weight"))
    assert stem < first < last
    blocks = {groups[f"{block.name}.norm.weight"] for block in model.blocks}
    assert len(blocks) == (4 if coarse else 5)


def test_checkpointing_changes_no_gradient():
    model, images = tiny(drop_path_rate=0.2).train(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*found))


@pytest.mark.parametrize("vanilla", [False, True])
def test_models_in_bfloat16(vanilla):
    model = tiny(vanilla=vanilla)
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    expected = model.forward_features(images)
    found = model.bfloat16().forward_features(images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_pools():
    model, images = tiny(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    tokens = model.forward_features(images)
    pools = {"avg": tokens.mean(1), "max": tokens.amax(1), "avgmax": (tokens.mean(1) + tokens.amax(1)) / 2, "": tokens}
    for pool, expected in pools.items():
        model.reset_classifier(0, pool)
        assert torch.allclose(model(images), expected, rtol=0, atol=1e-14)
    with pytest.raises(UserError, match="no special tokens"):
        model.reset_classifier(0, "token")


def test_filters_fit_other_channels():
    model, other = (timm.create_model("vmamba_pico_patch4_32", in_chans=n).eval() for n in (3, 1))
    load_state(other, Checkpoint(model.official_state(model.state_dict())), "a file")
    images = torch.randn(2, 1, 40, 40)
    assert torch.allclose(
        other.forward_features(images), model.forward_features(images.expand(-1, 3, -1, -1)), rtol=0, atol=1e-5
    )


def test_published_weights_are_fetched_from_their_address(monkeypatch):
    """An unreachable address is said, with what to do."""
    asked = []

    def refuse(url, **_):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(weights_module, "download_cached_file", refuse)
    with torch.device("meta"):
        model = timm.create_model("vmamba_tiny_s1l8")
    with pytest.raises(UserError, match=r"vmamba_tiny_s1l8 could not be fetched .* backbone.weights=PATH"):
        weights_module.load_official(model)
    assert asked == [model.pretrained_cfg["url"]]
    assert asked[0].endswith("v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth")


def test_weight_decay_spares_what_it_must_not_touch():
    model = tiny()
    spared, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in decayed["params"]}
    assert not any(name.endswith(("A_logs", ".Ds", ".bias")) or "norm" in name for name in kept)
    assert {"patch_embed.0.weight", "layers.0.blocks.0.op.in_proj.weight"} <= kept
    assert spared["weight_decay"] == 0
