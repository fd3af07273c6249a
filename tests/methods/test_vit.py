"""The transformer baseline: the backbone is timm's, and its methods follow their formulas (float64)."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.method_cases import CLASSES, IMAGES, ON_VIT, VIT_TINY, move, pooled, tiny_backbone
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import resize_pos_embed
from mambapeft_vision.methods.adapter_plus import AdapterPlus
from mambapeft_vision.methods.adaptformer import AdaptFormer
from mambapeft_vision.methods.additional_scan import AdditionalScan
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.fact import FacT
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.memba import Memba
from mambapeft_vision.methods.sdt import SDT
from mambapeft_vision.methods.state_offset import StateOffset
from mambapeft_vision.utils.errors import UserError

NAME = "ported_deit_small_patch16_224"
WEIGHTS = ["blocks.*.attn.*.weight", "blocks.*.mlp.*.weight"]


def built(method):
    model = move(adapt(tiny_backbone((ON_VIT,)), {"m": method}, CLASSES)).eval()
    return model, {name.rpartition(".")[2]: p for name, p in method.owned().items() if "blocks.1" in name}


def test_timms_weights_load_and_give_timms_features(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    theirs = VisionTransformer(num_classes=10, **sizes).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = create_backbone(NAME, tmp_path / "weights.safetensors", **VIT_TINY).eval()
    images = IMAGES.float()
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(pooled(ours, images), expected, rtol=1e-5, atol=1e-5)


def test_full_size_has_timms_tensors():
    with torch.device("meta"):
        ours = create_backbone(NAME, "random").state_dict()
    theirs = timm.create_model("deit_small_patch16_224", num_classes=0).state_dict()  # timm 1.0.15 needs values
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_heads_must_fit():
    assert create_backbone(NAME, "random", embed_dim=128, depth=1).blocks[0].attn.num_heads == 2
    with pytest.raises(UserError, match="num_heads=3"):
        create_backbone(NAME, "random", embed_dim=32, num_heads=3)


def test_there_is_no_kernel_to_choose():
    model = tiny_backbone((ON_VIT,))
    assert model.set_kernel("auto", "cpu") == "torch"
    with pytest.raises(UserError, match="leave kernel=auto"):
        model.set_kernel("triton", "cpu")


def test_drop_path_is_active_in_training_only():
    model = create_backbone(NAME, "random", **{**VIT_TINY, "drop_path_rate": 0.5})
    assert [block.drop_path for block in model.blocks] == [0, 0.5]
    images = IMAGES.float()
    plain = pooled(model.eval(), images)
    assert torch.equal(pooled(model, images), plain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = [pooled(model.train(), images) for _ in range(4)]
    assert any(not torch.equal(draw, draws[0]) for draw in draws)


def test_position_embedding_with_the_class_token_first():
    position = torch.cat((torch.full((1, 1, 4), 9.0), torch.ones(1, 16, 4)), dim=1)
    out = resize_pos_embed(position, tiny_backbone((ON_VIT,)).layout_of, (6, 6))
    assert out.shape == (1, 37, 4)
    assert (out[:, 0] == 9).all()
    torch.testing.assert_close(out[:, 1:], torch.ones(1, 36, 4))


@pytest.mark.parametrize("method", [Memba, StateOffset, SDT, lambda: Affix(tokens=1), lambda: AdditionalScan(states=1)])
def test_mamba_methods_are_refused(method):
    with pytest.raises(UserError, match="use a Vim backbone"):
        adapt(tiny_backbone((ON_VIT,)), {"m": method()}, CLASSES)


@pytest.mark.parametrize("method", [lambda: AdaptFormer(rank=2), lambda: AdapterPlus()])
def test_transformer_methods_are_refused_on_vim(method):
    with pytest.raises(UserError, match="backbone=vit_s"):
        adapt(tiny_backbone(), {"m": method()}, CLASSES)


def test_lora_on_values_leaves_queries_and_keys():
    method = LoRA(targets="blocks.*.attn.qkv.weight", rows="v", rank=2)
    model, _ = built(method)
    h = torch.randn(2, 5, 32, dtype=torch.float64)
    qkv = model.backbone.blocks[1].attn.qkv
    change = qkv(h) - F.linear(h, qkv.weight, qkv.bias)
    assert not change[..., :64].any()
    assert change[..., 64:].any()


def test_adaptformer():
    model, own = built(AdaptFormer(rank=3, scale=0.3))
    mlp, h = model.backbone.blocks[1].mlp, torch.randn(2, 5, 32, dtype=torch.float64)
    plain = F.gelu(h @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    expected = plain + 0.3 * (h @ own["down"].T).clamp(min=0) @ own["up"].T
    torch.testing.assert_close(mlp(h), expected, rtol=1e-12, atol=1e-12)


def test_adapter_plus():
    plain = tiny_backbone((ON_VIT,)).eval().blocks[1]
    model, own = built(AdapterPlus(dim=3))
    x, layout = torch.randn(2, 5, 32, dtype=torch.float64), model.backbone.layout
    out, _ = plain(x, layout)
    low = F.gelu(out @ own["down"].T + own["down_bias"])
    expected = out + own["scale"] * (low @ own["up"].T + own["up_bias"])
    torch.testing.assert_close(model.backbone.blocks[1](x, layout)[0], expected, rtol=1e-12, atol=1e-12)


def test_adapter_plus_leaves_out_whole_samples_in_training():
    """Each sample's adapter output is 0 or 1 / keep times the full one, in about the given share."""
    model, _ = built(AdapterPlus(dim=3, drop_path=0.25))
    site = model.methods["m"].sites["blocks/1"]
    x = torch.randn(400, 2, 32, dtype=torch.float64)
    full, dropped = site.eval()(x), site.train()(x)
    left_out = (dropped == 0).all(dim=(1, 2))
    torch.testing.assert_close(dropped[~left_out], full[~left_out] / 0.75, rtol=1e-12, atol=1e-12)
    assert 60 < left_out.sum() < 140
    with pytest.raises(UserError, match=r"drop_path=1.5; expected 0 <= drop_path < 1"):
        AdapterPlus(drop_path=1.5)


def test_fact():
    """Every D x D part of every weight changes by s · V C_kᵀ U."""
    method = FacT(rank=3, targets=WEIGHTS, scale=0.7)
    plain = tiny_backbone((ON_VIT,)).eval()
    model = move(adapt(tiny_backbone((ON_VIT,)), {"m": method}, CLASSES)).eval()
    own, slot = method.owned(), 0
    assert own["slots"].shape == (3, 24)
    with torch.no_grad():
        for block in plain.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                for rows in range(0, linear.out_features, 32):
                    for columns in range(0, linear.in_features, 32):
                        core = sum(own["slots"][t, slot] * own["core"][:, :, t] for t in range(3))
                        linear.weight[rows : rows + 32, columns : columns + 32] += 0.7 * own["v"] @ core.T @ own["u"]
                        slot += 1
    expected = pooled(plain, IMAGES)
    torch.testing.assert_close(pooled(model.backbone, IMAGES), expected, rtol=1e-10, atol=1e-12)
    model.merge()
    torch.testing.assert_close(pooled(model.backbone, IMAGES), expected, rtol=1e-10, atol=1e-12)
