"""What adapted models promise in other people's hands: evaluation mode, saving, one adaptation, the right weights."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from mambapeft_vision.adapter.files import ADAPTER_FILE
from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.computed import make_permanent
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.repadapter import RepAdapter
from mambapeft_vision.methods.ssf import SSF
from mambapeft_vision.methods.unfreeze import Unfreeze
from mambapeft_vision.utils.errors import UserError

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def backbone():
    return create_backbone("vim_pico_patch8_32", "random", depth=2, embed_dim=32, img_size=16, drop_path_rate=0.5)


def adapted(**methods: Method) -> AdaptedModel:
    model = adapt(backbone(), methods or {"lora": LoRA(targets="in_proj", rank=2, dropout=0.5)}, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.trained().values():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model


def test_a_loaded_model_is_in_evaluation_mode(tmp_path):
    model = adapted()
    model.save(tmp_path, {})
    loaded = load_adapter(tmp_path, "random")
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(IMAGES), model.eval()(IMAGES))


def test_a_trained_adapter_can_have_a_new_head(tmp_path):
    model = adapted()
    model.class_names, model.multi_label = ("a", "b", "c"), True
    model.save(tmp_path, {})
    loaded = load_adapter(tmp_path, "random", num_classes=5)
    assert (loaded.class_names, loaded.multi_label) == (None, False)
    assert all(torch.equal(loaded.owned()[name], p) for name, p in model.owned().items())
    assert torch.equal(loaded(IMAGES), torch.zeros(2, 5))
    assert {name for name, p in loaded.trained().items() if p.requires_grad} == model.trained().keys()
    loaded.save(tmp_path / "other", {})
    assert load_adapter(tmp_path / "other", "random").backbone.num_classes == 5
    with pytest.raises(UserError, match="num_classes=0"):
        load_adapter(tmp_path, "random", num_classes=0)


def test_a_merged_model_is_in_evaluation_mode():
    model = adapted(lora=LoRA(targets="in_proj", rank=2), affix=Affix(tokens=2)).train()
    model.merge()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(IMAGES), model(IMAGES))


def test_a_method_that_was_folded_cannot_be_saved(tmp_path):
    model = adapted(lora=LoRA(targets="in_proj", rank=2), affix=Affix(tokens=2))
    model.merge()
    with pytest.raises(UserError, match=r"lora cannot be saved as an adapter.*export_official"):
        model.save(tmp_path / "adapter", {})
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "method", [SSF(), RepAdapter(), LoRA(targets="in_proj", rank=2)], ids=["ssf", "repadapter", "lora"]
)
def test_a_merged_model_takes_no_other_adapter(method):
    """What was folded would stay; the methods that stay attached would be the other's."""
    model = adapted(one=method)
    state = {name: torch.ones_like(tensor) for name, tensor in model.adapter_state().items()}
    model.load_adapter_state(state)
    model.merge()
    before = model(IMAGES)
    with pytest.raises(UserError, match="cannot be loaded into a merged model"):
        model.load_adapter_state({name: 2 * tensor for name, tensor in state.items()})
    assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("head", [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3)), nn.Linear(32, 4)])
def test_a_head_that_nobody_could_load_is_not_saved(tmp_path, head):
    model = adapted()
    model.backbone.head = head
    with pytest.raises(UserError, match="the head is a .*expected the linear one of 3 classes"):
        model.save(tmp_path / "adapter", {})
    model.backbone.reset_classifier(4)
    model.save(tmp_path, {})
    assert load_adapter(tmp_path, "random")(IMAGES).shape == (2, 4)


@pytest.mark.parametrize(
    "wrapped", [nn.Sequential, lambda m: timm.create_model("vit_tiny_patch16_224"), lambda m: None]
)
def test_what_is_no_backbone_is_refused(wrapped):
    with pytest.raises(UserError, match=r"is no backbone of this package.*create_backbone"):
        adapt(wrapped(backbone()), {"lora": LoRA(targets="in_proj", rank=2)}, 3)


CHANGES = {
    "trained": lambda model: model.backbone.layers[0].norm.weight.data.mul_(1.01),
    "loaded": lambda model: model.backbone.load_state_dict(
        {name: tensor + 0.1 for name, tensor in model.backbone.state_dict().items()}
    ),
    "pruned": lambda model: prune.remove(pruned(model.backbone.layers[0].mixer.out_proj), "weight"),
}


def pruned(module: nn.Module, name: str = "weight") -> nn.Module:
    return prune.l1_unstructured(module, name, 0.5)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_no_method_owns_are_not_lost_silently(tmp_path, change):
    """By hand, in a training loop of one's own: the adapter would be saved without them."""
    model = adapted()
    CHANGES[change](model)
    with pytest.raises(UserError, match=r"the backbone was trained or changed.*Unfreeze"):
        model.save(tmp_path / "adapter", {})
    assert not (tmp_path / "adapter").exists()


def test_weights_beside_those_that_a_method_trains_are_not_lost_silently(tmp_path):
    model = adapted(norms=Unfreeze(targets="norm"))
    model.save(tmp_path, {})
    model.backbone.layers[1].mixer.out_proj.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"layers\.1\.mixer\.out_proj\.weight was trained"):
        model.save(tmp_path, {})


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()))])
def test_what_changes_no_weight_can_be_saved(tmp_path, change):
    model = adapted()
    change(model)
    model.requires_grad_(True)  # for the gradient with respect to images, say
    model.save(tmp_path, {})
    assert load_adapter(tmp_path, "random")(IMAGES.to(next(model.parameters()).dtype)).isfinite().all()


COMPUTED = {
    "pruned": pruned,
    "parametrized": parametrizations.weight_norm,
    "normalised": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights_are_adapted_once_they_are_permanent(how):
    """Methods find weights by the names of parameters, which would pass over these."""
    with_computed = backbone()
    COMPUTED[how](with_computed.layers[0].mixer.in_proj)
    with pytest.raises(UserError, match=r"layers\.0\.mixer\.in_proj\.weight is computed.*remove"):
        adapt(with_computed, {"lora": LoRA(targets="in_proj", rank=2)}, 3)
    make_permanent(with_computed.layers[0].mixer.in_proj, "weight")
    assert len(adapt(with_computed, {"lora": LoRA(targets="in_proj", rank=2)}, 3).owned()) == 4


def test_a_weight_that_is_no_parameter_any_more_is_named():
    """As in a model that is sharded."""
    sharded = backbone()
    in_proj = sharded.layers[0].mixer.in_proj
    weight = in_proj.weight.detach()
    del in_proj.weight
    in_proj.weight = weight
    with pytest.raises(UserError, match=r"in_proj\.weight is no parameter.*Adapt it first"):
        adapt(sharded, {"lora": LoRA(targets="in_proj", rank=2)}, 3)


def test_tensors_of_a_method_that_are_computed_are_not_saved_under_other_names(tmp_path):
    model = adapted(lora=LoRA(targets="in_proj", rank=2)).eval()
    site = next(module for module in model.methods.modules() if hasattr(module, "down"))
    pruned(site, "down")
    expected = model(IMAGES)
    with pytest.raises(UserError, match=r"down is computed.*Make it permanent"):
        model.save(tmp_path, {})
    prune.remove(site, "down")
    model.save(tmp_path, {})
    assert torch.equal(load_adapter(tmp_path, "random")(IMAGES), expected)


def test_what_stays_attached_can_be_saved_after_a_merge(tmp_path):
    """Its tables were folded into fewer tensors; nothing became a part of the backbone."""
    model = adapted(affix=Affix(tokens=2, projection=True))
    expected = model.eval()(IMAGES)
    model.merge()
    model.save(tmp_path, {})
    torch.testing.assert_close(load_adapter(tmp_path, "random")(IMAGES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [LoRA(targets="in_proj", rank=2), Unfreeze(targets="norm")])
def test_a_backbone_is_adapted_once(method):
    shared = backbone()
    first = adapt(shared, {"first": method}, 3).eval()
    with torch.no_grad():
        first.backbone.head.weight.normal_()
    expected = first(IMAGES)
    for again in (shared, copy.deepcopy(shared)):
        with pytest.raises(UserError, match=r"attached already.*create_backbone"):
            adapt(again, {"second": LoRA(targets="out_proj", rank=2)}, 5)
    assert torch.equal(first(IMAGES), expected)


def test_a_backbone_whose_adaptation_failed_is_not_used_again():
    half = backbone()
    with pytest.raises(UserError, match="takes one method"):
        adapt(half, {"a": Affix(tokens=2), "b": Affix(tokens=3)}, 3)
    with pytest.raises(UserError, match="some failed"):
        adapt(half, {"a": Affix(tokens=2)}, 3)


def test_a_backbone_that_everything_was_folded_into_is_a_plain_one():
    model = adapted()
    expected = model.eval()(IMAGES)
    model.merge()
    head = copy.deepcopy(model.backbone.head)
    again = adapt(model.backbone, {"lora": LoRA(targets="out_proj", rank=2)}, 3).eval()
    again.backbone.head.load_state_dict(head.state_dict())
    torch.testing.assert_close(again(IMAGES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("trained", "stored"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float64), (torch.float64, torch.float64)],
)
def test_an_adapter_in_another_dtype_finds_its_weights(trained, stored, tmp_path):
    """The hash is of the weights as the adapter was trained on them, not as they are cast for it."""
    model = adapt(backbone().to(trained), {"lora": LoRA(targets="in_proj", rank=2)}, 3)
    model.save(tmp_path, {})
    file = tmp_path / ADAPTER_FILE
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    loaded = load_adapter(tmp_path, "random")
    assert {p.dtype for p in loaded.parameters()} == {stored}
    loaded(IMAGES.to(stored))
