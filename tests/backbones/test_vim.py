"""The backbone: layout, variants, ports, drop path, initialisation."""

import json
import math

import pytest
import timm
import torch
from helpers.golden_values import GOLDEN
from helpers.method_cases import pooled

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.vim import Vim
from mambapeft_vision.utils.errors import UserError


def tiny(**kwargs) -> Vim:
    return Vim(**{"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_classes": 5, **kwargs})


@pytest.mark.parametrize(("name", "file"), [("small", "vim_s_keys"), ("base", "vim_b_keys")])
def test_keys_and_shapes_are_the_official_ones_in_order(name, file):
    expected = json.loads((GOLDEN / f"{file}.json").read_text())["keys"]
    with torch.device("meta"):
        sizes = {"small": 384, "base": 768}[name]
        state = Vim(embed_dim=sizes, num_classes=0).state_dict()
    assert list(state) == list(expected)
    assert {k: list(v.shape) for k, v in state.items()} == expected


@pytest.mark.parametrize(
    ("name", "tokens", "parameters"),
    [
        ("vim_tiny_patch16_224", 197, None),
        ("vim_small_patch16_224", 197, 25_411_584),
        ("vim_base_patch16_224", 197, 96_829_440),
        ("vim_small_patch16_stride8_224", 730, None),
    ],
)
def test_variants_are_timm_models(name, tokens, parameters):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert model.pos_embed.shape[1] == tokens
    assert model.layout.special == model.layout.readout == ((tokens - 1) // 2,)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.default_cfg["input_size"] == (3, 224, 224)


def test_drop_path_rates_are_those_of_the_reference():
    model = tiny(depth=4, drop_path_rate=0.3)
    rates = (1 - model.branch_scales.keep).tolist()
    # block 0 never; block i uses linspace(0, rate, depth)[i - 1]; the final norm uses the whole rate
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3])


def test_drop_path_scales_samples_and_is_off_in_evaluation():
    model = tiny(depth=4, drop_path_rate=0.5).train()
    torch.manual_seed(0)
    scales = model.branch_scales(4000)
    keep = model.branch_scales.keep[:, None].expand_as(scales)
    assert ((scales == 0) | (scales == 1 / keep)).all()
    assert torch.allclose(scales.mean(1), torch.ones(5), atol=0.08)
    assert model.eval().branch_scales(4) is None


def test_drop_path_of_everything_leaves_the_embedding():
    """With every branch dropped, the feature is the normalised class token of the embedding."""
    model = tiny(drop_path_rate=0.5).train()
    model.branch_scales.keep.fill_(1e-9)
    images = torch.randn(2, 3, 16, 16)
    token = model.layout.read(model.embed(images)[0]).squeeze(1)
    expected = token / token.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    assert torch.allclose(pooled(model, images), expected, atol=1e-5)


def test_initialisation_is_vims():
    torch.manual_seed(0)
    model = tiny(embed_dim=64, depth=16)
    mixer = model.layers[0].mixer
    assert torch.equal(mixer.A_log[0].exp().round(), torch.arange(1.0, 17.0))
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    delta = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert delta.min() >= 1e-4
    assert delta.max() <= 0.1 + 1e-6
    bound = 1 / math.sqrt(mixer.d_inner)  # nn.Linear's own, then scaled by depth
    assert mixer.out_proj.weight.abs().max() <= bound / 4 + 1e-6
    assert mixer.out_proj.weight.abs().max() > 0.9 * bound / 4
    assert not model.head.weight.any()
    assert not model.head.bias.any()


def test_wrong_image_size_is_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match=r"images are 24x24.*built for 16x16"):
        tiny()(torch.zeros(1, 3, 24, 24))


def test_row_blocks_are_exact():
    blocks = tiny().row_blocks("layers.1.mixer.x_proj_b.weight")
    assert blocks == {"d": slice(0, 1), "b": slice(1, 17), "c": slice(17, 33)}
    assert tiny().row_blocks("layers.1.mixer.in_proj.weight") == {"x": slice(0, 32), "z": slice(32, 64)}
    assert tiny().row_blocks("layers.1.norm.weight") == {}


def test_exclusive_ports_name_both_owners():
    model = tiny()
    model.prompt.set("one", lambda t, i: (t, i))
    with pytest.raises(UserError, match=r"'prompt'.*'one'.*'two'"):
        model.prompt.set("two", lambda t, i: (t, i))


def test_unknown_backbone_and_size_are_clear():
    with pytest.raises(UserError, match=r"vim_smal.*known: .*vim_small_patch16_224"):
        create_backbone("vim_smal", "random")
    with pytest.raises(UserError, match="embed_dimm"):
        create_backbone("vim_pico_patch8_32", "random", embed_dimm=3)
    with pytest.raises(UserError, match="could not be fetched"):
        create_backbone("vim_small_patch16_224", "official", depth=1)
    with pytest.raises(UserError, match="no published weights"):
        create_backbone("vim_pico_patch8_32", "official")


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a = create_backbone("vim_pico_patch8_32", "random", seed=3).state_dict()
    torch.manual_seed(2)
    b = create_backbone("vim_pico_patch8_32", "random", seed=3).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = create_backbone("vim_pico_patch8_32", "random", seed=4).state_dict()
    assert not torch.equal(a["cls_token"], c["cls_token"])


def test_halved_sum_and_plain_sum_differ_by_the_output_of_out_proj():
    torch.manual_seed(0)
    halved, summed = tiny(depth=1), tiny(depth=1, halve_sum=False)
    summed.load_state_dict(halved.state_dict())
    summed.layers[0].mixer.out_proj.weight.data /= 2
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(pooled(halved.eval(), images), pooled(summed.eval(), images), atol=1e-6)
