"""Describes a run in lines: briefly at its start, in full for `dry_run=true`, which trains nothing."""

import math
import re
from pathlib import Path
from typing import Any

import mambapeft_kernels

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.adapter.scaling import SIZES
from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.engine.device import resolve_device
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables.render import Table, to_text
from mambapeft_vision.run.build import (
    build_backbone_offline,
    build_dataset,
    build_logger,
    build_model,
    set_kernel,
)
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.progress import format_duration


def dry_run_report(plan: RunPlan) -> str:
    """Builds everything but the data, without downloads, and describes it. Raises UserError where the run would."""
    device = resolve_device(plan.recipe.device)
    dataset = build_dataset(plan)
    build_logger(plan)
    backbone, weights = build_backbone_offline(plan)
    set_kernel(backbone, plan.kernel, device)
    model = build_model(plan, backbone, dataset.count_classes())
    return "\n".join(
        [
            f"dry run: {plan.method_names} on {plan.task}, seed {plan.seed}",
            "",
            _sites_table(model, plan.recipe),
            "",
            *starting_lines(plan, model, dataset.batch_size),
            f"backbone {backbone.pretrained_cfg['architecture']}, {weights}",
            mambapeft_kernels.describe(plan.kernel, device),
            f"run folder {plan.folder}",
        ]
    )


def starting_lines(plan: RunPlan, model: AdaptedModel, batch_size: int) -> list[str]:
    """The trained parts and the recipe, in lines."""
    return [*describe_sizes(plan, model), describe_counts(model.counts()), describe_recipe(plan.recipe, batch_size)]


def describe_sizes(plan: RunPlan, model: AdaptedModel) -> list[str]:
    """A line with the methods' sizes that were scaled to the backbone, or none."""
    changed = [
        f"{name}.{key} {value} → {getattr(model.methods[name], key)}"
        for name, spec in plan.method_specs.items()
        for key, value in spec.items()
        if key in SIZES and getattr(model.methods[name], key) != value
    ]
    return [f"sizes scaled from Vim-S: {', '.join(changed)}"] if changed else []


def describe_counts(counts: dict[str, Any]) -> str:
    """The numbers of trained and frozen parameters in one line."""
    parts = "" if len(counts["by_method"]) < 2 else _parts(counts["by_method"])
    return f"trained: {counts['trainable']:,}{parts} and the head {counts['head']:,}; frozen: {counts['frozen']:,}"


def describe_recipe(recipe: TrainerConfig, batch_size: int) -> str:
    """The recipe in one line."""
    clip = "no clipping" if recipe.clip_norm is None else f"clipping at {recipe.clip_norm:g}"
    return (
        f"recipe: AdamW, lr {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}, batch {batch_size}, "
        f"{recipe.max_epochs} epochs ({recipe.warmup_epochs} warm-up, cosine to {recipe.min_lr:g}), {clip}, "
        f"{recipe.precision}"
    )


def measure(record: RunRecord) -> str:
    """The name of the record's measure: accuracy, or mean average precision."""
    return "mean average precision" if record.multi_label else "accuracy"


def summarise(record: RunRecord, folder: Path) -> str:
    """A finished run in a few lines."""
    of = f"({round(record.accuracy * record.num_test):,} of {record.num_test:,} test images)"
    if measure(record) != "accuracy":
        of = f"of {record.num_test:,} test images"
    lines = [
        ("result", f"{'+'.join(record.methods)} on {record.task}, seed {record.seed}"),
        ("accuracy" if measure(record) == "accuracy" else "mAP", f"{record.accuracy:.2%} {of}"),
        ("trained", f"{record.trainable:,} parameters and a head of {record.head:,}; {record.frozen:,} stayed frozen"),
        ("time", f"{format_duration(record.wall_seconds)}, of it {format_duration(record.train_seconds)} training"),
        (
            "speed",
            f"{record.train_images_per_second:,.0f} images/s in training, {record.test_images_per_second:,.0f} in the "
            f"test, on {record.device_name}",
        ),
        ("memory", f"{record.peak_memory_bytes / 2**20:,.0f} MiB at most"),
        ("files", str(folder)),
        *(("not merged", f"{name}: {reason}") for name, reason in record.unmerged.items()),
    ]
    return "\n" + "\n".join(f"  {name:<10} {text}" for name, text in lines)


def _parts(by_method: dict[str, int]) -> str:
    return f" ({', '.join(f'{name} {count:,}' for name, count in by_method.items())})"


def _sites_table(model: AdaptedModel, recipe: TrainerConfig) -> str:
    """A table of the trained tensors; tensors of one method that differ only in their layer share a line."""
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
