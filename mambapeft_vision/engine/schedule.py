"""AdamW over an adapted model's groups, and learning rates as pure functions of the step."""

import math
from collections.abc import Callable

from torch import Tensor
from torch.optim import AdamW, Optimizer

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.engine.config import TrainerConfig


def warm_up(base_lr: float, progress: float, start_factor: float = 0.0) -> float:
    """Linear, from start_factor · base_lr at progress 0 to base_lr at progress 1."""
    return base_lr * (start_factor + (1 - start_factor) * progress)


def cosine(base_lr: float, min_lr: float, turn: float) -> float:
    """From base_lr at turn 0 to min_lr at turn π."""
    return min_lr + (base_lr - min_lr) * (1 + math.cos(turn)) / 2


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
    """The learning rate of one step of fine-tuning (MambaPEFT, arXiv 2411.03855).

    Warm-up: linear a step, from start_factor · base_lr in the first to base_lr in the last warm-up step.
    Then a cosine that moves once an epoch, from base_lr towards min_lr, which is absolute: the same for groups of any
    multiplier (so one with base_lr < min_lr rises). A group switched off by a multiplier of 0 stays off.

    Args:
        step: counted from 0 over the whole run.
        epoch: counted from 0.
    """
    if base_lr == 0:
        return 0.0
    if epoch < warmup_epochs:
        last = warmup_epochs * steps_per_epoch - 1
        return warm_up(base_lr, step / last if last > 0 else 1.0, start_factor)
    return cosine(base_lr, min_lr, math.pi * (epoch - warmup_epochs) / (max_epochs - warmup_epochs))


def make_optimizer(model: AdaptedModel, recipe: TrainerConfig) -> AdamW:
    """AdamW over `model.param_groups`; each group keeps its base rate as `base_lr`."""
    groups = model.param_groups(recipe.learning_rate, recipe.weight_decay, recipe.head_lr_mult, recipe.head_decay_mult)
    groups = [{**group, "base_lr": group["lr"]} for group in groups]
    first, second = recipe.betas
    return AdamW(groups, betas=(first, second), eps=recipe.eps, fused=True)


def set_learning_rates(
    optimizer: Optimizer, recipe: TrainerConfig, *, step: int, epoch: int, steps_per_epoch: int
) -> None:
    """Sets every group's rate for the step about to be taken; depends on nothing but its arguments."""
    write_rates(
        optimizer,
        lambda base_lr: learning_rate(
            base_lr,
            step=step,
            epoch=epoch,
            steps_per_epoch=steps_per_epoch,
            max_epochs=recipe.max_epochs,
            warmup_epochs=recipe.warmup_epochs,
            start_factor=recipe.start_factor,
            min_lr=recipe.min_lr,
        ),
    )


def write_rates(optimizer: Optimizer, rate: Callable[[float], float]) -> None:
    """Sets every group's rate to `rate(base_lr)`, where a captured step reads it."""
    for group in optimizer.param_groups:
        value = rate(group["base_lr"])
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
