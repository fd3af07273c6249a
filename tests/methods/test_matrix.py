"""One behaviour matrix over every preset (found by globbing: a new yaml is tested without an edit) and hybrids."""

import copy
import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import (
    CLASSES,
    IMAGES,
    LABELS,
    PRESETS,
    ROWS,
    WARMED_UP,
    finish_warmup,
    methods_of,
    move,
    pooled,
    row_name,
    specs,
    tiny_backbone,
    tiny_model,
)

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import apply_adapter
from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import export_official

matrix = pytest.mark.parametrize("row", ROWS, ids=row_name)
BACKBONES = {
    "vim_s": "vim_small_patch16_224",
    "vim_b": "vim_base_patch16_224",
    "mambareg_s": "mambareg_small_patch16_224",
    "vit_s": "ported_deit_small_patch16_224",
}


@cache
def without_values(name: str) -> torch.nn.Module:
    """A backbone of shapes alone; to be copied."""
    with torch.device("meta"):
        return create_backbone(name, "random")


@cache
def as_made(row: tuple[str, ...]) -> AdaptedModel:
    """A row's model, not to be changed."""
    return tiny_model(row)


@matrix
def test_starts_as_the_base_model_or_says_not(row):
    base = pooled(tiny_backbone(row).eval(), IMAGES)
    model = tiny_model(row).eval()
    features = pooled(model.backbone, IMAGES)
    change = ((features - base).norm() / base.norm()).item()
    if all(m.identity_at_init for m in model.methods.values()):
        assert change < 1e-12
    else:
        assert change > 1e-9
    assert not model(IMAGES).any()  # the head starts at zero


@matrix
def test_gradient_reaches_every_owned_tensor_and_no_other(row):
    model = move(tiny_model(row))
    F.cross_entropy(model(IMAGES), LABELS).backward()
    trained = {id(p) for p in model.trained().values()}
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in trained), name
        assert p.grad is None or p.grad.any(), f"no gradient reaches {name}"


@pytest.mark.parametrize("name", PRESETS)
def test_count_is_the_headers(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        backbone = copy.deepcopy(without_values(BACKBONES[preset.backbone]))
        model = adapt(backbone, methods_of(preset.methods), CLASSES)
        finish_warmup(model)  # what counts is what the finished adapter holds
    counts = model.counts()
    assert counts["trainable"] == preset.count
    assert counts["head"] == CLASSES * (backbone.head_hidden_size + 1)


@matrix
def test_saved_and_loaded_bit_equal(row, tmp_path):
    model = move(tiny_model(row)).eval()
    model.save(tmp_path, {"task": "test"})
    loaded = apply_adapter(read_adapter(tmp_path), tiny_backbone(row)).eval()
    before, after = model.adapter_state(), loaded.adapter_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model(IMAGES), loaded(IMAGES))


@matrix
def test_merged_output_equal_or_obstacle_stated(row, tmp_path):
    model = move(tiny_model(row)).eval()
    expected = model(IMAGES)
    obstacles = {n: m.merge_obstacle for n, m in model.methods.items() if m.merge_obstacle is not None}
    left = model.merge()
    assert left == obstacles
    assert all(left.values())
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-10, atol=1e-12)
    names = set(model.backbone.state_dict())
    assert not any("parametrizations" in name for name in names)
    if not left:
        export_official(model.backbone, tmp_path / "merged.safetensors")
        assert names == set(tiny_backbone(row).state_dict()) | {"head.weight", "head.bias"}


@matrix
# float32 trains in the runs of all other tests, and every row's gradients in float64 are above.
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.exhaustive), "bf16"])
def test_trains_a_step(row, precision):
    model = move(tiny_model(row, torch.float32)).train()
    before = {name: p.clone() for name, p in model.trained().items()}
    optimiser = torch.optim.AdamW(model.param_groups(lr=1e-2, weight_decay=0.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = F.cross_entropy(model(IMAGES.float()), LABELS)
    loss.backward()
    optimiser.step()
    assert torch.isfinite(loss)
    for name, p in model.trained().items():
        assert torch.isfinite(p).all(), name
        assert not torch.equal(p, before[name]), f"{name} did not move"


@pytest.mark.parametrize("row", [row for row in ROWS if len(specs(row)) > 1], ids=row_name)
def test_order_of_a_hybrid_does_not_matter(row):
    forward, given = tiny_model(row), specs(row)
    reverse = adapt(tiny_backbone(row), methods_of(dict(reversed(given.items()))), CLASSES, seed=3)
    if WARMED_UP in row:
        finish_warmup(reverse)
    states = forward.adapter_state(), reverse.adapter_state()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert states[0].keys() == states[1].keys()
    assert torch.equal(move(forward).eval()(IMAGES), move(reverse).eval()(IMAGES))


@matrix
def test_a_method_starts_the_same_whatever_stands_beside_it(row):
    together = as_made(row).owned()
    name, spec = next(iter(specs(row).items()))
    alone = adapt(tiny_backbone(row), methods_of({name: spec}), CLASSES, seed=3)
    if WARMED_UP in row:
        finish_warmup(alone)
    alone = alone.owned()
    assert all(torch.equal(p, together[key]) for key, p in alone.items())


@matrix
def test_config_is_json_and_builds_the_method_again(row):
    for name, method in as_made(row).methods.items():
        config = json.loads(json.dumps(method.config()))
        assert config["_target_"].startswith("mambapeft_vision.methods.")
        assert build_method(name, config, "test").config() == config


@matrix
def test_a_deep_copy_stands_alone(row):
    """Ports hold the copy's methods, not the original's."""
    model = move(tiny_model(row)).eval()
    expected = model(IMAGES)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.owned().values():
            p += 0.1
        assert torch.equal(model(IMAGES), expected)
        assert torch.equal(twin(IMAGES), expected) == (not twin.owned())


@matrix
def test_every_owned_tensor_is_in_one_optimiser_group(row):
    model = as_made(row)
    groups = model.param_groups(lr=1e-3, weight_decay=1e-4)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.trained().values())
    rows = model.sites()
    assert {row["site"] for row in rows if row["method"] != "(head)"} == {
        key for m in model.methods.values() for key in m.owned()
    }
