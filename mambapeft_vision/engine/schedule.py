"""AdamW over an adapted model's groups, and the learning-rate schedule of METHODS.md as a pure function."""

import math

from torch import Tensor
from torch.optim import AdamW, Optimizer

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.run.config import TrainerConfig


def learning_rate(
    base_lr: float,
    *,
    step: int,
    epoch: int,
    steps_per_epoch: int,
    max_epochs: int,
    warmup_epochs: int,
    start_factor: float,
    min_lr: float,
) -> float:
    """The learning rate of one step.

    Warm-up: linear a step, from start_factor · base_lr in the first to base_lr in the last warm-up step.
    Then a cosine that moves once an epoch, from base_lr towards min_lr, which is absolute: the same for groups of any
    multiplier (so one with base_lr < min_lr rises). A group switched off by a multiplier of 0 stays off.

    Args:
        step: counted from 0 over the whole run; epoch: counted from 0.
    """
    if base_lr == 0:
        return 0.0
    if epoch < warmup_epochs:
        last = warmup_epochs * steps_per_epoch - 1
        progress = step / last if last > 0 else 1.0
        return base_lr * (start_factor + (1 - start_factor) * progress)
    turn = math.pi * (epoch - warmup_epochs) / (max_epochs - warmup_epochs)
    return min_lr + (base_lr - min_lr) * (1 + math.cos(turn)) / 2


def make_optimizer(model: AdaptedModel, recipe: TrainerConfig) -> AdamW:
    """AdamW over `model.param_groups`; each group keeps its base rate as `base_lr`."""
    groups = model.param_groups(recipe.learning_rate, recipe.weight_decay, recipe.head_lr_mult, recipe.head_decay_mult)
    groups = [{**group, "base_lr": group["lr"]} for group in groups]
    return AdamW(groups, betas=tuple(recipe.betas), eps=recipe.eps, fused=True)


def set_learning_rates(
    optimizer: Optimizer, recipe: TrainerConfig, *, step: int, epoch: int, steps_per_epoch: int
) -> None:
    """Sets every group's rate for the step about to be taken; depends on nothing but its arguments."""
    for group in optimizer.param_groups:
        rate = learning_rate(
            group["base_lr"],
            step=step,
            epoch=epoch,
            steps_per_epoch=steps_per_epoch,
            max_epochs=recipe.max_epochs,
            warmup_epochs=recipe.warmup_epochs,
            start_factor=recipe.start_factor,
            min_lr=recipe.min_lr,
        )
        if isinstance(group["lr"], Tensor):  # a recorded step reads it there
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
