"""Wrong arguments and conflicts are refused with what was given, what was expected and what to do."""

import pytest
import torch
from helpers.method_cases import CLASSES, tiny_backbone

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.methods.additional_scan import AdditionalScan
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.dora import DoRA
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.memba import Memba
from mambapeft_vision.methods.parallel_adapter import ParallelAdapter
from mambapeft_vision.methods.prodial import ProDiaL
from mambapeft_vision.methods.prompt import Prompt
from mambapeft_vision.methods.sdt import SDT
from mambapeft_vision.methods.spt import SPT
from mambapeft_vision.methods.state_offset import StateOffset
from mambapeft_vision.methods.unfreeze import Unfreeze
from mambapeft_vision.utils.errors import UserError

IN_PROJ, X_PROJ = "layers.*.mixer.in_proj.weight", "layers.*.mixer.x_proj.weight"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affix(tokens=1),
        lambda: Prompt(tokens=1),
        lambda: AdditionalScan(states=1),
        lambda: Memba(),
        lambda: StateOffset(form="state"),
        lambda: StateOffset(form="output"),
        lambda: Unfreeze(targets="cls_token"),
    ],
    ids=["affix", "prompt", "additional_scan", "memba", "state_offset", "output_offset", "unfreeze"],
)
def test_two_owners_of_one_place_are_refused_with_both_names(make):
    with pytest.raises(UserError) as error:
        adapt(tiny_backbone(), {"first": make(), "second": make()}, CLASSES)
    assert "first" in str(error.value)
    assert "second" in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DoRA(targets=IN_PROJ, rank=0), "rank=0"),
        (lambda: DoRA(targets=IN_PROJ, rank=2, magnitudes="cols"), "magnitudes='cols'; expected 'columns' or 'rows'"),
        (lambda: ParallelAdapter(rank=4, dropout=1.0), "dropout=1.0"),
        (lambda: ParallelAdapter(rank=True), "rank=True"),
        (lambda: Affix(tokens=2, position="middle"), "around_class"),
        (lambda: Affix(tokens=2, directions="both"), "'single' or 'dual'"),
        (lambda: Affix(tokens=2, position="suffix"), "directions: single"),
        (lambda: Affix(tokens=2, hidden=8), "projection: true"),
        (lambda: Affix(tokens=2, inner=False, lean=True), "inner: true"),
        (lambda: Prompt(tokens=2, position="around_class"), "prefix_suffix"),
        (lambda: AdditionalScan(states=1, position="middle"), "'before' or 'after'"),
        (lambda: AdditionalScan(states=1, init="zeros"), "'arange'"),
        (lambda: AdditionalScan(states=1, init="constant"), "number > 0"),
        (lambda: AdditionalScan(states=1, constant=2.0), "none with another init"),
        (lambda: ProDiaL(targets=IN_PROJ, n_blocks=2, rank=2, alpha=1, diagonal="fixed"), "'free' or 'relu'"),
        (lambda: Memba(threshold=0), "threshold=0"),
        (lambda: Memba(threshold=float("inf")), "or null"),
        (lambda: Memba(tau=-1), "tau=-1"),
        (lambda: StateOffset(form="both"), "'state' or 'output'"),
        (lambda: SDT(f_channels=1.0), "f_channels=1.0"),
        (lambda: SDT(f_channels=0.5, f_off=0.6), "f_off=0.6"),
        (lambda: SPT(targets=IN_PROJ, budget=0), "budget=0"),
        (lambda: LoRA(targets=IN_PROJ, rank=2, lr_mult=-1), "lr_mult=-1"),
    ],
)
def test_wrong_arguments(make, words):
    with pytest.raises(UserError, match=None) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: DoRA(targets="layers.*.mixer.in_prj.weight", rank=2), "layers.*.mixer.in_proj.weight"),
        (lambda: DoRA(targets=X_PROJ, rank=2, rows="x"), "d, b, c"),
        (lambda: DoRA(targets="layers.*.mixer.D", rank=2), "is a vector of 64 numbers"),
        (lambda: LoRA(targets="norm_f.weight", rank=2), "is a vector of 32 numbers"),
        (lambda: LoRA(targets="cls_token", rank=2, rows="x"), "no block of cls_token"),
        (lambda: Unfreeze(targets="**.bias", reinitialise=True), 'targets: "**" or reinitialise: false'),
        (lambda: ParallelAdapter(targets=X_PROJ, rank=2), "port on activations"),
        (lambda: ProDiaL(targets="patch_embed.proj.weight", n_blocks=2, rank=2, alpha=1), "port on activations"),
    ],
)
def test_wrong_places(method, words):
    with pytest.raises(UserError) as error:
        adapt(tiny_backbone(), {"mine": method()}, CLASSES)
    assert words in str(error.value)
    assert "mine" in str(error.value)


def test_from_scratch_comes_before_what_starts_from_the_weights():
    """DoRA's magnitudes are the norms of the weights that it will scale, whatever the methods are called."""
    methods = {"a": DoRA(targets=IN_PROJ, rank=2), "b": Unfreeze(targets="**", reinitialise=True)}
    model = adapt(tiny_backbone(), methods, CLASSES)
    weight = model.owned()["b.layers.0.mixer.in_proj.weight"]
    assert torch.equal(model.owned()["a.layers.0.mixer.in_proj.weight.magnitude"], weight.norm(dim=0, keepdim=True))
