"""Loading files of several families: what a file is for, conversions, resizing, hashes, licences."""

import argparse
import copy

import numpy as np
import pytest
import timm
import torch
from helpers.golden_values import GOLDEN
from helpers.hub import hub_with
from safetensors.torch import load_file, save_file

from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import (
    Checkpoint,
    backbone_sha256,
    content_sha256,
    export_official,
    load_state,
    load_weights,
)
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.utils.errors import UserError

SIZES = {"embed_dim": 16, "depth": 2}
PICO = {family: f"{family}_pico_patch8_32" for family in ("vim", "mambareg", "videomamba", "arm")}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny(family: str, **sizes):
    return create_backbone(PICO[family], "random", **{**SIZES, **sizes})


def file_of(model, path, **beside):
    torch.save({"model": model.state_dict(), **beside}, path)
    return path


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "backbones" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file if key != "config_json"}


# -- what a file is for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", PICO)
@pytest.mark.parametrize("mine", PICO)
def test_a_file_of_another_family_is_refused_by_name(mine, theirs, tmp_path):
    """Exported files say what they are for, so Vim and VideoMamba are told apart too."""
    path = tmp_path / "weights.safetensors"
    export_official(tiny(theirs), path)
    if mine == theirs:
        load_weights(tiny(mine), path)
        return
    names = {"vim": "Vim", "mambareg": "Mamba-Reg", "videomamba": "VideoMamba", "arm": "ARM"}
    with pytest.raises(UserError, match=f"weights of {names[theirs]}.*but this backbone is {names[mine]}"):
        load_weights(tiny(mine), path)


@pytest.mark.parametrize(
    ("file", "beside"),
    [
        ("videomamba_t16_in1k_res224.pth", {}),
        ("weights.pth", {"args": argparse.Namespace(model="videomamba_tiny")}),
        ("weights.pth", {"architecture": "videomamba_pico_patch8_32"}),
    ],
)
def test_the_name_of_a_file_or_its_training_says_what_keys_cannot(file, beside, tmp_path):
    path = file_of(tiny("videomamba"), tmp_path / file, **beside)
    with pytest.raises(UserError, match=r"weights of VideoMamba \(it says 'videomamba_"):
        load_weights(tiny("vim"), path)
    load_weights(tiny("videomamba"), path)


def test_a_file_that_says_nothing_loads_into_both(tmp_path):
    path = file_of(tiny("videomamba"), tmp_path / "weights.pth")
    for family in ("vim", "videomamba"):
        load_weights(tiny(family), path)


def test_a_student_of_distillation_brings_a_second_head(tmp_path):
    source, target = tiny("videomamba"), tiny("videomamba")
    student = {"distill_head.0.weight": torch.ones(16), "distill_head.1.weight": torch.ones(384, 16)}
    torch.save({**source.state_dict(), **student}, tmp_path / "weights.pth")  # flat, as some of its files are
    load_weights(target, tmp_path / "weights.pth")
    assert torch.equal(target.pos_embed, source.pos_embed)
    with pytest.raises(UserError, match="weights of VideoMamba"):
        load_weights(tiny("vim"), tmp_path / "weights.pth")


# -- conversions and other sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"), [("mambareg_12_resized", "mambareg"), ("videomamba_resized", "videomamba")]
)
def test_positions_are_resized_as_the_reference_does(name, family):
    arrays = golden(name)
    sizes = {"num_cls_tokens": 12, "cls_reduce": 4} if family == "mambareg" else {}
    model = tiny(family, img_size=48, d_state=8, **sizes).double()
    state = {key.removeprefix("param/"): t for key, t in arrays.items() if key.startswith("param/")}
    load_state(model, Checkpoint({**state, "pos_embed": arrays["checkpoint/pos_embed"]}), "golden")
    torch.testing.assert_close(model.pos_embed.detach(), arrays["param/pos_embed"], rtol=1e-12, atol=1e-12)


def test_arm_pretraining_weights_become_four_directions():
    arrays = golden("arm_from_pretraining")
    state = {key.removeprefix("checkpoint/"): t for key, t in arrays.items() if key.startswith("checkpoint/")}
    decoder = {"enc2dec.weight": torch.ones(2), "norm_4.weight": torch.ones(16), "ar_token": torch.ones(1)}
    model = tiny("arm", d_state=8).double()
    load_state(model, Checkpoint({**state, **decoder}), "golden")
    drawn = ("cls_token", "norm_f.weight", "norm_f.bias")
    assert model.not_in_file == drawn
    for key, expected in arrays.items():
        name = key.removeprefix("param/")
        if key.startswith("param/") and name not in drawn and not name.startswith("head."):
            torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-12, atol=1e-12)
    assert not model.cls_token.any() and not model.norm_f.bias.any()
    assert torch.equal(model.norm_f.weight.detach(), torch.ones(16, dtype=torch.float64))


def pretraining_file(path, **change):
    state = {
        key.removeprefix("checkpoint/"): t.float()
        for key, t in golden("arm_from_pretraining").items()
        if "checkpoint/" in key
    }
    torch.save({"model": {**state, **change}}, path)
    return path


def test_what_no_file_holds_is_stored_with_the_adapter(tmp_path):
    weights = pretraining_file(tmp_path / "pretrained.pth")
    backbone = create_backbone(PICO["arm"], str(weights), **SIZES, d_state=8)
    with torch.no_grad():  # whatever they are when the adapter is made
        backbone.cls_token.fill_(0.5)
        backbone.norm_f.weight.fill_(1.5)
    model = adapt(backbone, {"lora": LoRA(targets="in_proj", rank=2)}, 3).eval()
    torch.nn.init.normal_(model.backbone.head.weight)
    model.save(tmp_path / "adapter", {})
    stored = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert {"backbone.cls_token", "backbone.norm_f.weight", "backbone.norm_f.bias"} <= set(stored)
    loaded = load_adapter(tmp_path / "adapter", str(weights)).eval()
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    ordinary = adapt(tiny("arm"), {"lora": LoRA(targets="in_proj", rank=2)}, 3)
    assert not any(name.startswith("backbone.") for name in ordinary.adapter_state())


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("family", PICO)
def test_filters_fit_other_numbers_of_channels_as_timms_do(family, channels, tmp_path):
    source = tiny(family)
    model = tiny(family, in_chans=channels)
    load_weights(model, file_of(source, tmp_path / "weights.pth"))
    expected = timm.models.adapt_input_conv(channels, source.patch_embed.proj.weight)
    assert torch.equal(model.patch_embed.proj.weight, expected)
    assert model(torch.zeros(1, channels, 32, 32)).shape[0] == 1


# -- hashes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PICO)
def test_the_hash_is_of_the_files_own_tensors(family, tmp_path):
    """Before positions are resized: what that gives depends on the machine in its last bits."""
    path = file_of(tiny(family), tmp_path / "weights.pth")
    small = tiny(family)
    large = tiny(family, img_size=48)
    load_weights(small, path)
    load_weights(large, path)
    assert backbone_sha256(small) == backbone_sha256(large) == content_sha256(small)
    assert backbone_sha256(large) != content_sha256(large)


@pytest.mark.parametrize("family", PICO)
def test_the_hash_is_that_of_the_present_weights(family, tmp_path):
    path = file_of(tiny(family), tmp_path / "weights.pth")
    model = tiny(family, img_size=48)
    load_weights(model, path)
    expected = backbone_sha256(model)
    assert backbone_sha256(copy.deepcopy(model)) == expected
    assert backbone_sha256(copy.deepcopy(model).bfloat16()) != expected
    model.norm_f.weight.data.mul_(2)  # which PyTorch's counter of writes does not see
    assert backbone_sha256(model) == content_sha256(model) != expected


def test_an_adapter_in_another_dtype_and_size_finds_its_weights(tmp_path):
    weights = file_of(tiny("vim"), tmp_path / "weights.pth")
    backbone = create_backbone(PICO["vim"], str(weights), **SIZES, img_size=48)
    model = adapt(backbone, {"lora": LoRA(targets="in_proj", rank=2)}, 3)
    model.save(tmp_path / "adapter", {})
    file = tmp_path / "adapter" / "adapter.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    loaded = load_adapter(tmp_path / "adapter", str(weights))
    assert loaded.backbone.pos_embed.dtype == torch.bfloat16


def test_an_adapter_is_not_attached_to_another_architecture(tmp_path):
    """Vim and VideoMamba of one size can have the very same tensors."""
    weights = file_of(tiny("vim"), tmp_path / "weights.pth")
    adapt(create_backbone(PICO["vim"], str(weights), **SIZES), {}, 3).save(tmp_path / "adapter", {})
    from mambapeft_vision.adapter.files import read_adapter
    from mambapeft_vision.adapter.load import apply_adapter

    other = create_backbone(PICO["videomamba"], str(weights), **SIZES)
    with pytest.raises(UserError, match="was trained on vim_pico_patch8_32, but this backbone is videomamba_pico"):
        apply_adapter(read_adapter(tmp_path / "adapter"), other)


# -- licences ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The hub, which must not be asked."""
    asked = []

    def download(repository, file, **options):
        asked.append((repository, file))
        raise OSError("offline")

    hub_with(monkeypatch, {}, download)
    return asked


def test_nothing_is_fetched_without_a_licence_or_the_users_word(hub, capsys):
    with pytest.raises(UserError, match="no licence was found for the weights mambar_small_patch16_224.pth"):
        create_backbone("mambareg_small_patch16_224", depth=1)
    with pytest.raises(UserError, match=r"weights_license='accepted'"):
        timm.create_model("mambareg_small_patch16_224", pretrained=True, depth=1)
    assert hub == []
    for build in (
        lambda: create_backbone("mambareg_small_patch16_224", weights_license="accepted", depth=1),
        lambda: timm.create_model("mambareg_small_patch16_224", True, weights_license="accepted", depth=1),
    ):
        with pytest.raises(UserError, match="could not be fetched"):
            build()
    assert hub == [("Wangf3014/Mamba-Reg", "mambar_small_patch16_224.pth")] * 2
    assert "licence: none found, accepted by weights_license" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected 'accepted'"):
        create_backbone("mambareg_small_patch16_224", weights_license="yes")


def test_a_licence_is_shown_before_a_download(hub, capsys):
    with pytest.raises(UserError, match="could not be fetched"):
        create_backbone("videomamba_tiny_patch16_448", depth=1)
    assert hub == [("OpenGVLab/VideoMamba", "videomamba_t16_in1k_res224to448.pth")]
    assert "licence: apache-2.0" in capsys.readouterr().err


def test_weights_that_are_too_large_are_not_downloaded(hub, monkeypatch):
    hub_with(monkeypatch, {"OpenGVLab/VideoMamba": {"videomamba_t16_in1k_res224to448.pth": 10**11}})
    with pytest.raises(UserError, match="pth has 100,000,000,000 bytes; expected at most 16,000,000,000. Nothing was"):
        create_backbone("videomamba_tiny_patch16_448", depth=1)
    assert hub == []


@pytest.mark.parametrize("answers", [True, False])
def test_what_is_downloaded_is_what_was_measured(monkeypatch, answers):
    """Where the hub does not answer, only its client's cache is asked."""
    asked = {}

    def download(repository, file, **options):
        asked.update(options)
        raise OSError("offline")

    files = {"OpenGVLab/VideoMamba": {"videomamba_t16_in1k_res224to448.pth": 10**8}}
    hub_with(monkeypatch, files if answers else {}, download)
    with pytest.raises(UserError, match="could not be fetched"):
        create_backbone("videomamba_tiny_patch16_448", depth=1)
    assert asked == {"revision": "commit of None" if answers else None, "local_files_only": not answers}


def test_weights_whose_names_are_not_known_need_a_path(hub, tmp_path):
    with pytest.raises(
        UserError, match=r"arm_base_patch16_224 has no weights whose file names are known.*weights=PATH"
    ):
        create_backbone("arm_base_patch16_224", depth=1)
    with pytest.raises(UserError, match="whose file names are known"):
        timm.create_model("arm_base_patch16_224", pretrained=True, depth=1)
    assert hub == []
