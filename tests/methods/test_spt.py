"""SPT: what it measures and selects, and what then changes, against a naive recomputation."""

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import CLASSES, IMAGES, LABELS, PRESETS, methods_of, move, pooled
from helpers.two_phases import BUDGETS, WARMUP, new_backbone, new_model, optimiser_of, train

from mambapeft_vision.adapter.model import adapt


def parts_of(kind, tensors):
    """SPT's matrices and vectors by name: views of `tensors`, which are by the backbone's names."""
    backbone, parts = new_backbone(kind), {}
    for key in new_model(kind).methods["two_phases"].sites:
        name = key.replace("/", ".")
        stem, _, block = name.rpartition(".")
        parts[name] = tensors[name] if name in tensors else tensors[stem][backbone.row_blocks(stem)[block]]
    return parts


def lora_size(name, part):
    """What a LoRA of rank 2 trains; None for what gets none."""
    is_matrix = part.ndim == 2 and not name.endswith("_log")
    return 2 * sum(part.shape) if is_matrix and 2 * sum(part.shape) < part.numel() else None


def naive_selection(kind):
    """Trains the head alone with the gradient of every weight switched on; then takes entry by entry."""
    model = adapt(new_backbone(kind), methods_of(PRESETS["linear_probe"].methods), CLASSES)
    weights = {name: p.requires_grad_(True) for name, p in model.backbone.named_parameters()}
    optimiser, sums = optimiser_of(model), {name: torch.zeros_like(p) for name, p in weights.items()}
    for _ in range(WARMUP):
        model.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        for name, p in weights.items():
            sums[name] += p.grad**2
        optimiser.step()
    parts = parts_of(kind, sums)
    every = ((s, name, i) for name, part in parts.items() for i, s in enumerate(part.flatten().tolist()))
    chosen, trained = {name: [] for name in parts}, 0
    for _, name, place in sorted(every, reverse=True):
        if trained < BUDGETS[kind] and len(chosen[name]) != lora_size(name, parts[name]):
            chosen[name].append(place)
            trained += 1
    is_lora = {name: len(places) == lora_size(name, parts[name]) for name, places in chosen.items()}
    return {name: "lora" if is_lora[name] else sorted(places) for name, places in chosen.items()}


@pytest.mark.parametrize("kind", BUDGETS)
def test_sensitivities_select_as_naively(kind):
    model = new_model(kind)
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    assert not model.owned()
    train(model, 0, WARMUP)
    moved = {n for n, p in model.backbone.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"head.weight", "head.bias"}

    line = model.methods["two_phases"].finish_warmup()
    saved, expected = model.methods["two_phases"].saved(), naive_selection(kind)
    for name, selected in expected.items():
        if selected == "lora":
            assert {f"{name}.down", f"{name}.up"} <= saved.keys()
        else:
            assert saved.get(f"{name}.places", torch.empty(0)).tolist() == selected, name
            assert f"{name}.down" not in saved
    kinds = [s if s == "lora" else bool(s) for s in expected.values()]
    assert all(kind in kinds for kind in ("lora", True, False))
    assert f"LoRA on {kinds.count('lora')} of {len(kinds)} weights" in line
    assert model.counts()["trainable"] == BUDGETS[kind]
    after = {name: p for name, p in model.backbone.named_parameters() if not name.startswith("head.")}
    assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("kind", BUDGETS)
def test_spt_changes_weights_by_its_formula_and_merges_exactly(kind):
    model = new_model(kind)
    train(model, 0, WARMUP + 1)
    own, plain = move(model).methods["two_phases"].saved(), new_backbone(kind).eval()
    with torch.no_grad():
        for name, part in parts_of(kind, dict(plain.named_parameters())).items():
            if f"{name}.down" in own:
                part += 0.5 * own[f"{name}.up"] @ own[f"{name}.down"]
            for place, entry in zip(own.get(f"{name}.places", ()), own.get(f"{name}.entries", ())):
                part.view(-1)[place] += entry
    expected = pooled(plain, IMAGES)
    torch.testing.assert_close(pooled(model.eval().backbone, IMAGES), expected, rtol=1e-10, atol=1e-12)
    assert model.merge() == {}
    torch.testing.assert_close(pooled(model.backbone, IMAGES), expected, rtol=1e-10, atol=1e-12)
    assert model.backbone.state_dict().keys() - {"head.weight", "head.bias"} == plain.state_dict().keys()


def test_spt_measures_in_training_only():
    model = new_model("vit")
    train(model, 0, 2)
    before = {name: t.clone() for name, t in model.methods["two_phases"].saved().items()}
    F.cross_entropy(model.eval()(IMAGES), LABELS).backward()
    after = model.methods["two_phases"].saved()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(t.any() for t in before.values())
