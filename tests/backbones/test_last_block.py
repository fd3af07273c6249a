"""The last block computes only what the class token needs, and features and gradients are those of whole blocks."""

import pytest
import torch
from mambapeft_kernels import ssm_mixer

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import vim
from mambapeft_vision.backbones.vim import Vim
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.memba import Memba
from mambapeft_vision.methods.prompt import Prompt
from mambapeft_vision.methods.state_offset import StateOffset

TOKENS = {16: 5, 24: 10}  # by image size: an odd and an even number
PROJECTIONS = [f"layers.*.mixer.{name}.weight" for name in ("in_proj", "out_proj")]


@pytest.fixture
def lengths(monkeypatch) -> list[tuple[int, int]]:
    """(tokens, directions) of every call of the mixer's core."""
    calls = []

    def noted(x, z, directions, *rest):
        calls.append((x.shape[1], len(directions)))
        return ssm_mixer(x, z, directions, *rest)

    monkeypatch.setattr(vim, "ssm_mixer", noted)
    return calls


def small(size: int = 16, index: int | None = None, dtype: torch.dtype = torch.float32, **kwargs) -> Vim:
    torch.manual_seed(0)
    model = Vim(size, patch_size=8, embed_dim=16, depth=2, num_classes=0, drop_path_rate=0.0, **kwargs).to(dtype)
    if index is not None:
        model.class_token_index = index
    return model


def feature_and_gradients(model: Vim, owned: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Of a fixed loss: for the images, all that asks for a gradient in the backbone, and what methods own."""
    size, like = model.patch_embed.img_size, model.norm_f.weight
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *size, generator=generator).to(like.dtype).requires_grad_()
    leaves = {"images": images, **{n: p for n, p in model.named_parameters() if p.requires_grad}, **(owned or {})}
    torch.manual_seed(2)  # dropout
    feature = model.forward_features(images)
    loss = (feature * torch.randn(feature.shape, generator=generator).to(like.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {"feature": feature.detach(), **{n: g for n, g in zip(leaves, grads) if g is not None}}


def check_same(
    model: Vim,
    lengths: list[tuple[int, int]],
    parts: list[tuple[int, int]],
    owned: dict[str, torch.Tensor] | None = None,
) -> None:
    """The same with a watched last block as without; that one's scans were `parts`, as (tokens, directions)."""
    found = feature_and_gradients(model, owned)
    assert lengths[len(model.layers) - 1 :] == parts
    tokens = lengths[0]
    lengths.clear()
    handle = model.layers[-1].register_forward_hook(lambda *_: None)
    expected = feature_and_gradients(model, owned)
    assert lengths == [tokens] * len(model.layers)
    handle.remove()
    assert expected.keys() == found.keys()
    assert len(expected) > 3
    bar = 1e-5 if found["feature"].dtype == torch.float32 else 1e-12
    for name, value in expected.items():
        assert (found[name] - value).norm() <= bar * value.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", ["start", "middle", "end"])
@pytest.mark.parametrize("size", TOKENS)
def test_plain(size, place, dtype, lengths):
    tokens = TOKENS[size]
    index = {"start": 0, "middle": None, "end": tokens - 1}[place]
    model = small(size, index, dtype)
    at = model.class_token_index
    check_same(model, lengths, [(at + 1, 1), (tokens - at, 1)])


@pytest.mark.parametrize("kwargs", [{"halve_sum": False}, {"expand": 1, "d_conv": 2}, {"d_state": 3}], ids=str)
def test_other_sizes(kwargs, lengths):
    check_same(small(**kwargs), lengths, [(3, 1), (3, 1)])


def test_naive_backend(lengths):
    model = small()
    model.set_kernel("naive", "cpu")
    check_same(model, lengths, [(3, 1), (3, 1)])


@pytest.mark.parametrize(
    "method",
    [
        lambda: LoRA(targets=PROJECTIONS, rank=2, scale=1.0),
        lambda: LoRA(targets=PROJECTIONS[0], rank=2, scale=1.0, rows="x", dropout=0.5),
        lambda: Memba(chunks=2),
        lambda: StateOffset(form="state"),
        lambda: StateOffset(form="output"),
    ],
    ids=["lora", "lora_x with dropout", "memba", "state_offset", "output_offset"],
)
def test_with_methods(method, lengths):
    """The ports beside and inside the mixer that see every token for itself."""
    model = adapt(small(24), {"m": method()}, 3).train()
    with torch.no_grad():  # away from where methods start, which is often at zero
        for parameter in model.owned().values():
            parameter += 0.3 * torch.randn(parameter.shape)
    at = model.backbone.class_token_index
    check_same(model.backbone.requires_grad_(), lengths, [(at + 1, 1), (10 - at, 1)], model.owned())


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_prompts_move_the_class_token(position, lengths):
    model = adapt(small(), {"m": Prompt(tokens=3, position=position)}, 3)
    at = 2 + 3 * (position == "prefix")
    check_same(model.backbone.requires_grad_(), lengths, [(at + 1, 1), (8 - at, 1)], model.owned())


@pytest.mark.parametrize(
    ("kwargs", "scans"),
    [({"position": "prefix"}, [(9, 2)]), ({"position": "infix"}, [(7, 1), (7, 1)])],
    ids=["one buffer", "two buffers"],
)
def test_affix_tokens_need_whole_blocks(kwargs, scans, lengths):
    model = adapt(small(), {"m": Affix(tokens=2, **kwargs)}, 3)
    found = feature_and_gradients(model.backbone)
    assert lengths == scans * 2
    model.backbone.layers[-1].register_forward_hook(lambda *_: None)
    expected = feature_and_gradients(model.backbone)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("path", ["", ".mixer", ".mixer.out_proj", ".norm"])
@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_who_watches_a_part_of_the_last_block_sees_all_tokens(path, register, lengths):
    model, seen = small(), []
    module = model.get_submodule(f"layers.1{path}")
    getattr(module, f"register_{register}")(lambda module, *tensors: seen.append(tensors))
    model.forward_features(torch.randn(2, 3, 16, 16)).sum().backward()
    assert lengths == [(5, 2), (5, 2)]
    first = seen[0][-1][0] if isinstance(seen[0][-1], tuple) else seen[0][-1]
    assert first.shape[:2] == (2, 5)


def test_a_block_or_mixer_of_somebody_else_gets_what_it_always_got(lengths):
    class Wrapped(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.mixer = block, block.mixer

        def forward(self, hidden, residual, branch_scale):
            hidden, residual = self.block(hidden, residual, branch_scale)
            return hidden.flip(1), residual

    images = torch.randn(2, 3, 24, 24)
    flipped = small(24)
    flipped.layers[1] = Wrapped(flipped.layers[1])
    first, second = flipped.forward_features(images), small(24).forward_features(images)
    assert not torch.allclose(first, second, atol=1e-3)
    assert lengths[:2] == [(10, 2), (10, 2)]

    patched = small(24)
    mixer = patched.layers[1].mixer
    mixer.forward = lambda h: vim.Mixer.forward(mixer, h).flip(1)
    assert torch.equal(patched.forward_features(images), first)


def test_one_token_of_a_mixer_is_that_of_all():
    """`only` of a mixer by itself, where its affix port is taken too."""
    model = adapt(small(), {"m": Affix(tokens=2)}, 3).backbone
    h = torch.randn(2, 5, 16)
    for mixer in (model.layers[0].mixer, small().layers[0].mixer):
        for only in range(5):
            torch.testing.assert_close(mixer(h, only), mixer(h)[:, only : only + 1])
