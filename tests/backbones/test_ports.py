"""Weight ports, casts of frozen weights, and the ports on what enters and leaves a block."""

import copy

import pytest
import torch
from helpers.method_cases import IMAGES, ON_VIT, pooled, tiny_backbone
from torch import nn
from torch.nn.utils import parametrize, prune

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import ports
from mambapeft_vision.backbones.contract import FunctionBranch, bake_weights, frozen_casts, taken_ports
from mambapeft_vision.backbones.layers import PortedLinear
from mambapeft_vision.backbones.weights import export_official
from mambapeft_vision.methods.targets import owner_module, weight_port
from mambapeft_vision.utils.errors import UserError

ROWS = [(), (ON_VIT,)]
both = pytest.mark.parametrize("row", ROWS, ids=["vim", "vit"])


def named(row) -> list[str]:
    return [name for name, _ in tiny_backbone(row).named_parameters()]


# -- weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "name"), [(row, name) for row in ROWS for name in named(row)])
def test_the_backbone_reads_every_parameter_through_its_port(row, name):
    """Adding Δ through the port is adding Δ to the parameter; and nothing else changes, least of all the keys."""
    model, plain = tiny_backbone(row).eval(), tiny_backbone(row).eval()
    keys = list(model.state_dict())
    weight = plain.get_parameter(name)
    delta = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    before = model(IMAGES)
    weight_port(model, name).add("owner", lambda _: delta)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        weight += delta
    expected = plain(IMAGES)
    assert not torch.allclose(expected, before, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-12, atol=1e-12)
    assert taken_ports(model) == [name]
    bake_weights(model)
    assert list(model.state_dict()) == keys and not taken_ports(model)
    assert torch.equal(model.get_parameter(name), weight) and not model.get_parameter(name).requires_grad


def test_deltas_see_the_frozen_rows_and_add_up_and_the_reshape_comes_last():
    port, weight = ports.WeightPort("w"), torch.arange(24.0).view(2, 4, 3)
    port.set_reshape("last", lambda total: torch.cat((total, total), dim=-1))
    port.add("all", lambda w: w)
    port.add("rows", lambda w: 10 * w, slice(1, 3))
    expected = 2 * weight
    expected[:, 1:3] += 10 * weight[:, 1:3]
    assert torch.equal(port(weight), torch.cat((expected, expected), dim=-1))
    with pytest.raises(UserError, match="'last'.*'second'.*shape of w"):
        port.set_reshape("second", lambda total: total)


def test_a_module_that_reads_without_ports_is_refused():
    model = tiny_backbone()
    model.reset_classifier(3)
    with pytest.raises(UserError, match=r"head.weight has no weight port; expected a parameter that Vim reads"):
        weight_port(model, "head.weight")


def test_foreign_parametrizations_and_pruning_work_beside_a_port():
    model = tiny_backbone().eval()
    linear, _ = owner_module(model, "layers.0.mixer.in_proj.weight")
    weight_port(model, "layers.0.mixer.in_proj.weight").add("owner", lambda w: w)  # doubles it
    expected = 2 * linear(torch.ones(1, 1, 32, dtype=torch.float64)) / 2

    class Third(nn.Module):
        def forward(self, weight):
            return weight / 3

    parametrize.register_parametrization(linear, "weight", Third())
    torch.testing.assert_close(linear(torch.ones(1, 1, 32, dtype=torch.float64)), expected / 3)
    out_proj, _ = owner_module(model, "layers.0.mixer.out_proj.weight")
    prune.l1_unstructured(out_proj, "weight", amount=0.5)
    x = torch.ones(1, 1, out_proj.in_features, dtype=torch.float64)
    assert torch.equal(out_proj(x), nn.functional.linear(x, out_proj.weight_orig * out_proj.weight_mask))


def test_what_is_attached_is_no_plain_checkpoint(tmp_path):
    model = tiny_backbone()
    weight_port(model, "layers.1.mixer.D").add("owner", lambda w: w)
    model.layers[0].mixer.in_proj.side.add(FunctionBranch("owner", lambda x: x))
    model.layers[0].tap.add("owner", lambda tokens, layout: None)
    assert set(taken_ports(model)) == {"layers.1.mixer.D", "layers.0.mixer.in_proj", "layers.0.tap"}
    with pytest.raises(UserError, match="still has methods attached"):
        export_official(model, tmp_path / "w.pth")


# -- casts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def linear() -> PortedLinear:
    torch.manual_seed(0)
    return PortedLinear(6, 10, bias=False, name="linear").requires_grad_(False)


def test_a_cast_lives_as_long_as_its_context(linear):
    x = torch.randn(4, 6)
    with frozen_casts(linear, torch.bfloat16):
        cast = linear.read("weight", torch.bfloat16)
        assert cast.dtype == torch.bfloat16 and linear.read("weight", torch.bfloat16) is cast
        assert linear.read("weight") is linear.weight and linear.read("weight", torch.float16) is linear.weight
        with torch.autocast("cpu", torch.bfloat16):
            inside = linear(x)
    assert linear.read("weight", torch.bfloat16) is linear.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), inside)


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.data.mul_(2), lambda w: w.data.copy_(2 * w)])
def test_no_cast_is_ever_older_than_its_context(linear, write):
    """Also after writes that no version counter sees."""
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        with frozen_casts(linear, torch.bfloat16):
            before = linear(x)
        with torch.no_grad():
            write(linear.weight)
        assert torch.equal(linear(x), 2 * before)
        with torch.inference_mode(), frozen_casts(linear, torch.bfloat16):
            assert torch.equal(linear(x), 2 * before)
        with frozen_casts(linear, torch.bfloat16):
            assert torch.equal(copy.deepcopy(linear)(x), 2 * before)


def test_casts_go_when_the_context_is_left_by_an_error(linear):
    with pytest.raises(RuntimeError, match="broken off"), frozen_casts(linear, torch.bfloat16):
        raise RuntimeError("broken off")
    assert linear.read("weight", torch.bfloat16) is linear.weight


def test_only_frozen_weights_without_a_port_are_cast(linear):
    linear.requires_grad_(True)
    with frozen_casts(linear, torch.bfloat16):
        assert linear.read("weight", torch.bfloat16) is linear.weight
    linear.requires_grad_(False)
    linear.weight_port("weight", "weight").add("owner", lambda w: w)
    with frozen_casts(linear, torch.bfloat16):
        assert torch.equal(linear.read("weight", torch.bfloat16), 2 * linear.weight)
    with frozen_casts(linear, None):
        assert not linear.casts


# -- blocks ---------------------------------------------------------------------------------------------------


@both
def test_a_function_on_the_input_of_every_block(row):
    """The input of block i is what block i - 1 hands on; a function of it changes the features as it should."""
    model = tiny_backbone(row).eval()
    seen = []

    def noted(tokens, layout):
        seen.append((tokens, layout))
        return tokens, layout

    expected = pooled(model, IMAGES)
    for block in model.blocks:
        block.input.set("owner", noted)
    found = model(IMAGES)
    assert torch.equal(found, expected)
    assert [tokens.shape for tokens, _ in seen] == [(3, 17, 32)] * 2
    assert {layout for _, layout in seen} == {model.layout}
    with pytest.raises(UserError, match=r"'blocks.0.input|layers.0.input'.*'owner'.*'other'"):
        model.blocks[0].input.set("other", noted)


@both
def test_only_patches_can_be_changed(row):
    """SVP's way: the layout says which tokens are patches."""
    model = tiny_backbone(row).eval()
    before = pooled(model, IMAGES)

    def doubled(tokens, layout):
        factor = torch.ones(layout.length, 1, dtype=tokens.dtype)
        factor[list(layout.patches)] = 2
        return tokens * factor, layout

    model.blocks[0].input.set("owner", doubled)
    embedded = []
    model.blocks[0].tap.add("reader", lambda tokens, layout: embedded.append(tokens))
    assert not torch.allclose(model(IMAGES), before)
    assert not embedded[0].requires_grad


@both
def test_tokens_that_join_at_the_first_block_move_what_is_read_out(row):
    """As a prompt port would do it: same features, and the head finds the class token."""
    prompts = torch.randn(2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def joined(tokens, layout):
        new = prompts.expand(tokens.shape[0], -1, -1)
        return torch.cat((new, tokens), dim=1), layout.joined([0, 0])

    first, second = tiny_backbone(row).eval(), tiny_backbone(row).eval()
    first.prompt.set("owner", joined)
    second.blocks[0].input.set("owner", joined)
    assert first.output_layout() == second.output_layout() == first.layout.joined([0, 0])
    assert torch.equal(first(IMAGES), second(IMAGES))
    assert torch.equal(pooled(first, IMAGES), first(IMAGES))
    assert first.forward_features(IMAGES).shape == (3, 19, 32)
    with pytest.raises(UserError, match=r"shape \(3, 17, 32\); expected \[B, 19, D\]"):
        first.forward_head(torch.zeros(3, 17, 32, dtype=torch.float64))


def test_vim_refuses_other_numbers_of_tokens_at_later_blocks():
    model = tiny_backbone().eval()
    model.blocks[1].input.set("owner", lambda tokens, layout: (tokens[:, 1:], layout))
    with pytest.raises(UserError, match=r"'owner' changes the number of tokens in layers.1 from 17 to 16"):
        model(IMAGES)


@both
def test_a_tap_reads_and_no_gradient_comes_back(row):
    model = tiny_backbone(row).eval()
    read = {}
    for name in ("one", "two"):
        model.blocks[0].tap.add(name, lambda tokens, layout, name=name: read.update({name: (tokens, layout)}))
    expected = tiny_backbone(row).eval()(IMAGES)
    assert torch.equal(model(IMAGES), expected)
    (tokens, layout), again = read["one"], read["two"][0]
    assert torch.equal(tokens, again) and tokens.shape == (3, 17, 32) and layout == model.layout
    assert not tokens.requires_grad
    adapted = adapt(model, {}, 3)
    side = nn.Linear(32, 3).double()
    (adapted(IMAGES) + side(read["one"][0].mean(1))).sum().backward()
    assert side.weight.grad.any()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("head."))
    model.blocks[0].tap.remove("one")
    assert [name for name, _ in model.blocks[0].tap.readers] == ["two"]


def test_the_tap_of_a_vim_block_is_the_residual_stream():
    """What the final norm would see if the block were the last."""
    model, short = tiny_backbone().eval(), tiny_backbone().eval()
    del short.layers[1]
    read = []
    model.blocks[0].tap.add("owner", lambda tokens, layout: read.append(tokens))
    model(IMAGES)
    feature, _ = short.norm_f(short.layout.read(read[0]), None)
    torch.testing.assert_close(feature.squeeze(1), pooled(short, IMAGES), rtol=1e-12, atol=1e-12)
