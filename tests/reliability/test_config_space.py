"""A property of the whole config space: a composition trains, saves, loads and merges, or is refused clearly."""

import re
from pathlib import Path

import pytest
import torch
from helpers.drawn_compositions import Composition, draw
from omegaconf import OmegaConf
from torch import Tensor, nn

from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.engine.loop import step_settings
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.engine.schedule import make_optimizer, set_learning_rates
from mambapeft_vision.engine.step import TrainStep
from mambapeft_vision.run.build import build_backbone, build_model, set_kernel
from mambapeft_vision.run.config import TrainConfig
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.utils.errors import UserError

DRAWS, IN_ONE_TEST, ALWAYS = 200, 20, 80
# Words with which a message says what to do or what would have been right.
REMEDIES = re.compile(r"expected|remove|set |use |change |blocks of it|nearest|give ", re.IGNORECASE)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[] if first < ALWAYS else [pytest.mark.exhaustive])
        for first in range(0, DRAWS, IN_ONE_TEST)
    ],
)
def test_a_composition_works_or_is_refused(first, tmp_path):
    for number in range(first, first + IN_ONE_TEST):
        composition = draw(number)
        try:
            works_or_is_refused(composition, tmp_path / str(number))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} of {composition}") from error


@pytest.mark.parametrize("draws", [ALWAYS, pytest.param(DRAWS, marks=pytest.mark.exhaustive)])
def test_most_compositions_are_not_refused(draws):
    """A space that is mostly refused would prove nothing. Of many draws: among twenty, chance decides."""
    refused = 0
    for number in range(draws):
        try:
            built(draw(number))
        except UserError:
            refused += 1
    assert refused <= draws / 2


def built(composition: Composition) -> tuple[RunPlan, AdaptedModel]:
    plan = make_plan(OmegaConf.merge(OmegaConf.structured(TrainConfig), composition.config))
    return plan, build_model(plan, backbone_of(plan), composition.classes)


def works_or_is_refused(composition: Composition, folder: Path) -> None:
    """What is not refused clearly has everything tried on it."""
    try:
        plan, model = built(composition)
    except UserError as refusal:
        assert_is_clear(refusal, composition)
        return
    random = torch.Generator().manual_seed(composition.number)
    images = torch.randint(0, 256, (composition.images, 3, 32, 32), generator=random, dtype=torch.uint8)
    labels = torch.randint(0, composition.classes, (composition.images,), generator=random)
    normalise = Normalise(Preprocessing.from_timm(model.backbone.default_cfg))
    train(plan, model, normalise, images, labels)
    inputs = normalise(images)
    loaded = saved_and_loaded(plan, model, folder, inputs)
    merges(model, inputs)
    merges(loaded, inputs)


def backbone_of(plan: RunPlan) -> nn.Module:
    backbone = build_backbone(plan)
    set_kernel(backbone, plan.config["kernel"], torch.device("cpu"))
    return backbone


def assert_is_clear(refusal: UserError, composition: Composition) -> None:
    """It names a method of the composition, what was wrong with it, and what to do."""
    message = str(refusal)
    assert any(re.search(rf"\b{name}\b", message) for name in composition.config["method"]), message
    assert REMEDIES.search(message), message
    assert len(message) < 500, message


def train(plan: RunPlan, model: AdaptedModel, normalise: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Four steps (the head starts at zero: the first reaches nothing else); phases end after the second."""
    model.train()
    trained = {id(p) for p in model.trained().values()}
    before = {name: p.clone() for name, p in model.backbone.named_parameters() if id(p) not in trained}
    with torch.random.fork_rng(devices=[]):
        take_steps(plan, model, normalise, images, labels, epoch=0)
        for method in model.methods.values():
            if method.warming_up:
                method.finish_warmup()
        take_steps(plan, model, normalise, images, labels, epoch=1)
    for name, p in model.trained().items():
        assert torch.isfinite(p).all(), name
    now = dict(model.backbone.named_parameters())
    for name, p in before.items():
        assert torch.equal(now[name], p), f"{name} is frozen and changed"


def take_steps(
    plan: RunPlan, model: AdaptedModel, normalise: nn.Module, images: Tensor, labels: Tensor, epoch: int
) -> None:
    optimizer = make_optimizer(model, plan.recipe)
    step = TrainStep(model, normalise, optimizer, step_settings(plan.recipe, plan.recipe.precision), print)
    for number in range(2):
        set_learning_rates(optimizer, plan.recipe, step=2 * epoch + number, epoch=epoch, steps_per_epoch=2)
        step(images, labels, seed=number)
    assert not step.failed(wait=True)


@torch.no_grad()
def saved_and_loaded(plan: RunPlan, model: AdaptedModel, folder: Path, inputs: Tensor) -> AdaptedModel:
    """The model read from what `model` saved, on a backbone built as that says: its logits are the same to the bit."""
    model.save(folder, {"task": plan.task})
    loaded = load_adapter(folder, "random", plan.config["backbone"]["seed"]).eval()
    logits = model.eval()(inputs)
    assert logits.any()
    assert torch.equal(loaded(inputs), logits)
    return loaded


@torch.no_grad()
def merges(model: AdaptedModel, inputs: Tensor) -> None:
    """Merged logits are the same up to rounding in float64; what stays attached says why."""
    inputs = inputs.double()
    expected = model.double()(inputs)
    obstacles = {name: m.merge_obstacle for name, m in model.methods.items() if m.merge_obstacle is not None}
    left = model.merge()
    assert left == obstacles == {name: m.merge_obstacle for name, m in model.methods.items()}
    assert all(left.values())
    torch.testing.assert_close(model(inputs), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
