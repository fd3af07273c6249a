"""The training step's parts."""

import math

import pytest
import timm
import torch
from helpers import runs
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from mambapeft_kernels import look_up
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mambapeft_vision.data import Preprocessing
from mambapeft_vision.engine.callbacks import largest_gradient
from mambapeft_vision.engine.loop import step_settings
from mambapeft_vision.engine.module import FineTuning, Normalise, epoch_seed
from mambapeft_vision.engine.schedule import make_optimizer, write_rates
from mambapeft_vision.engine.step import StepSettings, TrainStep
from mambapeft_vision.run.build import build_backbone, build_model
from mambapeft_vision.run.run_config import make_plan

QUIET = {"logger": False, "enable_progress_bar": False}
BATCHES = DataLoader(TensorDataset(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)), batch_size=2)


@pytest.fixture
def module(task, tmp_path) -> FineTuning:
    return make_module(task, tmp_path)


def make_module(task, outputs, *overrides: str) -> FineTuning:
    plan = make_plan(runs.compose_train(runs.overrides(task, outputs, *overrides)))
    model = build_model(plan, build_backbone(plan), num_classes=3)
    return FineTuning(model, nn.Identity(), plan.recipe, 0, step_settings(plan.recipe, "fp32"))


def step_of(module: FineTuning, **settings) -> TrainStep:
    optimizer = make_optimizer(module.model, module.recipe)
    return TrainStep(module.model.train(), nn.Identity(), optimizer, StepSettings("fp32", None, **settings), print)


def test_normalisation_scales_and_shifts_each_channel():
    normalise = Normalise(Preprocessing((2, 2), "bicubic", (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)))
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    values = normalise(images)
    assert values.dtype == torch.float32 and values.shape == (2, 3, 2, 2)
    assert values[0, :, 0, 0].tolist() == pytest.approx([-1.0, 3.0, 0.1])
    assert normalise.state_dict() == {}


IMAGENET = Preprocessing((2, 2), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def all_levels() -> torch.Tensor:
    """Images [2, 3, 16, 16] with every level in every channel, in different orders."""
    return torch.stack([torch.randperm(256) for _ in range(6)]).to(torch.uint8).view(2, 3, 16, 16)


def test_the_table_is_the_expression_bit_for_bit():
    normalise, images = Normalise(IMAGENET), all_levels()
    expected = (images.float() / 255 - normalise.mean) / normalise.std
    assert torch.equal(normalise(images), expected)
    assert torch.equal(look_up(images, normalise.table), expected)


def test_under_autocast_images_are_rounded_to_its_dtype_and_features_are_the_same():
    normalise, images = Normalise(IMAGENET), torch.randint(0, 256, (2, 3, 32, 32)).to(torch.uint8)
    backbone = timm.create_model("vim_pico_patch8_32", num_classes=0)
    wide = normalise(images)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = normalise(images)
        assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())
        assert torch.equal(backbone.patch_embed(narrow), backbone.patch_embed(wide))
    assert wide.dtype == normalise(images).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, which is not here")
def test_a_gpu_normalises_to_the_same_bits():
    normalise, images = Normalise(IMAGENET), all_levels()
    expected = normalise(images)
    normalise.cuda()
    assert torch.equal(normalise(images.cuda()).cpu(), expected)
    with torch.autocast("cuda", torch.bfloat16):
        found = normalise(images.cuda())
    assert found.dtype == torch.bfloat16 and torch.equal(found.cpu(), expected.bfloat16())


def test_the_head_starts_at_zero_so_the_first_step_moves_the_head_alone(module):
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loss = step_of(module).gradients(images, labels, seed=0)
    assert loss == pytest.approx(math.log(3), rel=1e-6)
    moving = {name for name, p in module.model.trained().items() if p.grad is not None and p.grad.any()}
    assert moving == {"head.weight", "head.bias"}
    assert largest_gradient(module)[0] == "head"
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_largest_gradient_counts_nan_as_largest(module):
    for name, parameter in module.model.trained().items():
        parameter.grad = torch.full_like(parameter, 1e3 if "head" in name else 1.0)
    assert largest_gradient(module)[0] == "head"
    module.model.trained()["lora_p_x.layers.1.mixer.in_proj.weight.up"].grad[0, 0] = float("nan")
    site, norm = largest_gradient(module)
    assert site == "lora_p_x.layers.1.mixer.in_proj.weight" and math.isnan(norm)


def test_totals_are_sums_over_images_not_batches(module):
    optimizer = make_optimizer(module.model, module.recipe)
    step = TrainStep(module.model.train(), nn.Identity(), optimizer, StepSettings("fp32", None), print)
    write_rates(optimizer, lambda _: 0.0)
    for labels in (torch.tensor([0, 0, 0]), torch.tensor([1])):  # zero logits: argmax is class 0
        step(torch.randn(len(labels), 3, 32, 32), labels, seed=0)
    assert step.take_totals() == (pytest.approx(4 * math.log(3)), 3, 2)
    assert step.take_totals() == (0.0, 0, 0)


def test_a_step_draws_by_its_seed_alone(module):
    for parameter in module.model.trained().values():  # off the head's zeros, so that dropout shows in the loss
        torch.nn.init.normal_(parameter, std=0.1)
    for method in module.model.methods.values():
        for branch in method.sites.values():
            branch.dropout = 0.5
    step, images, labels = step_of(module), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    losses = [step.gradients(images, labels, seed) for seed in (7, 7, 8)]
    assert losses[0] == losses[1] != losses[2]


def test_micro_batches_add_up_to_the_batch(task, tmp_path):
    """Without what is drawn for each pass anew: dropout and drop path."""
    module = make_module(task, tmp_path, "method.lora_p_x.dropout=0", "+backbone.drop_path_rate=0")
    for name, parameter in module.model.trained().items():  # off their start, so that every gradient is something
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1])
    found = []
    for micro_batch in (None, 2):
        loss = step_of(module, micro_batch=micro_batch).gradients(images, labels, seed=0)
        found.append([torch.tensor(loss), *(p.grad.clone() for p in module.model.trained().values())])
    for whole, parts in zip(*found):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_neither_do_later_ones(module):
    step = step_of(module)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    step(images, labels, seed=0)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert not step.failed()
    step(images * float("nan"), labels, seed=1)
    assert step.failed()
    step(images, labels, seed=2)
    assert step.failed(wait=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert step.take_totals()[2] == 1


def test_state_is_the_adapter_and_loads_strictly(module):
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in module.state_dict().items()}
    assert not any(name.startswith(("backbone", "model")) for name in state)
    module.load_state_dict(state)
    assert all((tensor == 0.5).all() for tensor in module.state_dict().values())
    del state["head.bias"]
    with pytest.raises(ValueError, match=r"missing: head\.bias"):
        module.load_state_dict(state)


@pytest.mark.parametrize("limits", [{"max_steps": 2, "max_epochs": 3}, {"max_epochs": -1}, {"max_steps": 0}])
def test_a_trainer_that_counts_steps_is_refused(module, limits):
    """The schedule of learning rates goes by epochs."""
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, **QUIET, **limits)
    with pytest.raises(ValueError, match=r"max_steps=.*expected max_epochs"):
        trainer.fit(module, BATCHES)


@pytest.mark.parametrize(
    "how", [{}, {"every_n_epochs": 1}, {"every_n_train_steps": 2}], ids=["as it is", "epochs", "steps"]
)
def test_lightning_counts_the_steps_so_that_its_checkpoints_are_written(module, tmp_path, how):
    """It writes none where `trainer.global_step` is what it was."""
    callback = ModelCheckpoint(tmp_path, save_top_k=-1, **how)
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(module, BATCHES)
    assert trainer.global_step == module.steps_done == 4
    assert sorted(file.stem for file in tmp_path.glob("*.ckpt")) == ["epoch=0-step=2", "epoch=1-step=4"]


def test_epoch_seeds_differ():
    seeds = {epoch_seed(seed, epoch) for seed in range(10) for epoch in range(100)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
