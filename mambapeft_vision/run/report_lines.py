"""`dry_run=true`: what a run would train and where, without data, downloads or training."""

import math
import re
from typing import Any

import mambapeft_kernels

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.adapter.scaling import SIZES
from mambapeft_vision.results.tables.render import Table, to_text
from mambapeft_vision.run.build import (
    build_backbone_offline,
    build_dataset,
    build_logger,
    build_model,
    resolve_device,
    set_kernel,
)
from mambapeft_vision.run.config import TrainerConfig
from mambapeft_vision.run.run_config import RunPlan


def dry_run_report(plan: RunPlan) -> str:
    """Builds everything but the data, and describes it. Raises UserError where the run would."""
    device = resolve_device(plan.recipe.device)
    dataset = build_dataset(plan)
    build_logger(plan)
    backbone, weights = build_backbone_offline(plan)
    set_kernel(backbone, plan.config["kernel"], device)
    model = build_model(plan, backbone, dataset.num_classes)
    return "\n".join(
        [
            f"dry run: {plan.method_names} on {plan.task}, seed {plan.seed}",
            "",
            _sites_table(model, plan.recipe),
            "",
            *describe_sizes(plan, model),
            describe_counts(model.counts()),
            f"backbone {backbone.default_cfg['name']}, {weights}",
            describe_recipe(plan.recipe, dataset.batch_size),
            mambapeft_kernels.describe(plan.config["kernel"], device),
            f"run folder {plan.folder}",
        ]
    )


def describe_sizes(plan: RunPlan, model: AdaptedModel) -> list[str]:
    """A line with the methods' sizes that were scaled to the backbone, or none."""
    changed = [
        f"{name}.{key} {value} → {getattr(model.methods[name], key)}"
        for name, spec in plan.config["method"].items()
        for key, value in spec.items()
        if key in SIZES and getattr(model.methods[name], key) != value
    ]
    return [f"sizes scaled from Vim-S: {', '.join(changed)}"] if changed else []


def describe_counts(counts: dict[str, Any]) -> str:
    parts = "" if len(counts["by_method"]) < 2 else _parts(counts["by_method"])
    return f"trained: {counts['trainable']:,}{parts} and the head {counts['head']:,}; frozen: {counts['frozen']:,}"


def describe_recipe(recipe: TrainerConfig, batch_size: int) -> str:
    clip = "no clipping" if recipe.clip_norm is None else f"clipping at {recipe.clip_norm:g}"
    return (
        f"recipe: AdamW, lr {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}, batch {batch_size}, "
        f"{recipe.max_epochs} epochs ({recipe.warmup_epochs} warm-up, cosine to {recipe.min_lr:g}), {clip}, "
        f"{recipe.precision}"
    )


def _parts(by_method: dict[str, int]) -> str:
    return f" ({', '.join(f'{name} {count:,}' for name, count in by_method.items())})"


def _sites_table(model: AdaptedModel, recipe: TrainerConfig) -> str:
    """One line for all trained tensors of one method whose sites differ in the layer's number alone."""
    groups: dict[tuple[Any, ...], int] = {}
    for row in model.sites():
        lr_mult, decay_mult = row["lr_mult"], row["decay_mult"]
        if row["method"] == "(head)":
            lr_mult, decay_mult = lr_mult * recipe.head_lr_mult, decay_mult * recipe.head_decay_mult
        site = re.sub(r"\.\d+\.", ".*.", row["site"])
        key = (row["method"], site, row["shape"], lr_mult, decay_mult)
        groups[key] = groups.get(key, 0) + 1
    lines = [
        (method, site, f"{sites}", "x".join(map(str, shape)), f"{sites * math.prod(shape):,}", f"{lr:g}", f"{decay:g}")
        for (method, site, shape, lr, decay), sites in groups.items()
    ]
    header = ("method", "site", "sites", "shape", "numbers", "lr x", "decay x")
    return to_text(Table("", header, lines, left=(0, 1)))
