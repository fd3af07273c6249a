"""Weights in and out: official layout, restricted unpickling, strictness, position embeddings."""

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file

from mambapeft_vision.backbones.vim import Vim
from mambapeft_vision.backbones.weights import (
    export_official,
    load_weights,
    read_state_dict,
    resize_pos_embed,
)
from mambapeft_vision.utils.errors import UserError


def tiny(**kwargs) -> Vim:
    return Vim(**{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5, **kwargs})


def official_file(path, model):
    """A file as the official ones are: key `model` beside leftovers of training."""
    content = {"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, path)
    return path


def test_official_checkpoint_loads_without_its_head(tmp_path):
    torch.manual_seed(0)
    source, target = tiny(num_classes=1000), tiny()
    torch.nn.init.normal_(source.head.weight)
    load_weights(target, official_file(tmp_path / "w.pth", source))
    for key, value in target.state_dict().items():
        if key.startswith("head."):
            assert not value.any()
        else:
            assert torch.equal(value, source.state_dict()[key])


def test_safetensors_load(tmp_path):
    source, target = tiny(), tiny()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target.pos_embed, source.pos_embed)


@pytest.mark.parametrize("name", ["w", "w.pth", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_the_format_is_told_by_the_content(tmp_path, name, save):
    """Files of the hub's cache have no ending; others were renamed."""
    source, target = tiny(), tiny()
    save(dict(source.state_dict()), tmp_path / name)
    load_weights(target, tmp_path / name)
    assert torch.equal(target.pos_embed, source.pos_embed)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>log in</html>", "a web page"),
        (b"<html><body>404</body></html>", "a web page"),
    ],
)
def test_what_stands_in_the_place_of_a_file_is_named(tmp_path, content, what):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=what):
        load_weights(tiny(), tmp_path / "w.pth")


def test_nothing_is_half_loaded(tmp_path):
    source, target = tiny(), tiny()
    state = source.state_dict()
    del state["cls_token"]
    state["surplus"] = torch.zeros(1)
    state["layers.1.mixer.D"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "w.pth")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(target, tmp_path / "w.pth")
    for part in ("missing: cls_token", "unknown: surplus", "shape of layers.1.mixer.D: (3,), expected (32,)"):
        assert part in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickled_code_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"model": {"a": torch.zeros(1)}, "evil": Malicious(marker)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_state_dict(tmp_path / "w.pth")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 torn"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_files_are_named(tmp_path, content, suffix):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        read_state_dict(path)


def test_missing_file_and_foreign_content(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        read_state_dict(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state dict"):
        read_state_dict(tmp_path / "list.pth")


def test_position_embedding_resizes_with_the_class_token_apart(tmp_path):
    small, large = tiny(), tiny(img_size=64)
    load_weights(large, official_file(tmp_path / "w.pth", small))
    assert torch.equal(large.layout.read(large.pos_embed), small.layout.read(small.pos_embed))
    assert torch.equal(large.layers[0].mixer.D, small.layers[0].mixer.D)


LAYOUT_OF = Vim(16, patch_size=8, embed_dim=16, depth=1).layout_of


def test_resized_constant_stays_constant_and_same_grid_is_identity():
    position = torch.full((1, 17, 4), 2.0)
    position[:, 8] = -1.0
    out = resize_pos_embed(position, LAYOUT_OF, (6, 6))
    assert out.shape == (1, 37, 4)
    assert torch.equal(out[:, 18], position[:, 8])
    assert torch.allclose(torch.cat((out[:, :18], out[:, 19:]), 1), torch.tensor(2.0))
    random = torch.randn(1, 17, 4)
    assert torch.allclose(resize_pos_embed(random, LAYOUT_OF, (4, 4)), random, atol=1e-6)
    with pytest.raises(UserError, match="no square grid"):
        resize_pos_embed(torch.zeros(1, 16, 4), LAYOUT_OF, (4, 4))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_export_round_trip(tmp_path, name):
    source = tiny()
    export_official(source, tmp_path / name)
    again = read_state_dict(tmp_path / name)
    assert set(again) == set(source.state_dict())
    assert all(torch.equal(again[k], v) for k, v in source.state_dict().items())
