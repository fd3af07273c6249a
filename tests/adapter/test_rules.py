"""What adapted models promise in other people's hands: evaluation mode, saving, one adaptation, the right weights."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambapeft_vision.adapter.files import ADAPTER_FILE
from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.method import Method
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
