"""The cost of a large sweep before it begins: runs, hours by measured rates, and room on the disk."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.results.tables import MISSING, Table
from mambapeft_vision.run.build import build_backbone_without_weights, build_methods
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.sweep.estimates import Speeds
from mambapeft_vision.sweep.jobs import Job, State

BYTES = 4  # a trained parameter takes, because adapters are float32
FILES = 60_000  # bytes of a run's other files, about: config, log, metrics, result
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """The cost of one backbone's runs.

    Args:
        backbone: name of a config.
        methods: number of presets that fit; left_out: number of presets that do not.
        seconds: duration of these runs one after another; None if no rate of this backbone is known.
        disk: bytes that the finished runs take, without decoded images.
        note: what the runs need before they can start.
    """

    backbone: str
    methods: int
    left_out: int
    runs: int
    finished: int
    seconds: float | None
    disk: int
    note: str = ""


def cost_of(backbone: str, jobs: Sequence[Job], speeds: Speeds, left_out: int = 0, note: str = "") -> Cost:
    """The cost of jobs on one backbone. Models are built on shapes alone. Raises UserError.

    Args:
        backbone, left_out, note: as in `Cost`.
        jobs: the runs.
        speeds: estimates the durations.
    """
    todo = [job for job in jobs if job.state is not State.FINISHED]
    plans = {job.plan.method_names: job.plan for job in jobs}
    sizes = {name: _parameters(plan) for name, plan in plans.items()}
    return Cost(
        backbone=backbone,
        methods=len(plans),
        left_out=left_out,
        runs=len(jobs),
        finished=len(jobs) - len(todo),
        seconds=speeds.total(job.plan for job in todo),
        disk=sum(_bytes(job.plan, *sizes[job.plan.method_names]) for job in jobs),
        note=note,
    )


def _parameters(plan: RunPlan) -> tuple[int, int]:
    """Trained parameters without the head, and the head's parameters for one class."""
    with torch.device("meta"):
        backbone, classes = build_backbone_without_weights(plan), 2
        counts = adapt(backbone, build_methods(plan, backbone), classes, plan.seed).counts()
    return counts["trainable"], counts["head"] // classes


def _bytes(plan: RunPlan, trained: int, head: int) -> int:
    """Bytes of a finished run's folder: the adapter with its head, test probabilities in half precision, the rest."""
    classes, images = plan.dataset["num_classes"], plan.dataset.get("num_test") or 0
    return BYTES * (trained + head * classes) + 2 * classes * images + FILES


def cache_bytes(jobs: Sequence[Job], pixels: int) -> int:
    """Bytes of all tasks' decoded images, three channels of `pixels` each. Backbones of one image size share them."""
    datasets = {job.plan.task: job.plan.dataset for job in jobs}
    images = sum((dataset.get("num_test") or 0) + 1000 for dataset in datasets.values())
    return 3 * pixels * images


def cost_table(costs: Sequence[Cost], workers: int) -> Table:
    """The costs as a table, a row for each backbone, with the time for `workers` at a time."""
    rows = [
        [
            cost.backbone,
            f"{cost.methods}" + (f" ({cost.left_out} do not fit)" if cost.left_out else ""),
            f"{cost.runs:,}",
            f"{cost.finished:,}",
            MISSING if cost.seconds is None else f"{cost.seconds / 3600 / workers:.1f}",
            f"{cost.disk / GIB:.1f}",
            cost.note,
        ]
        for cost in costs
    ]
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    total = f"{sum(known) / 3600 / workers:.1f}" + ("" if len(known) == len(costs) else " and what is not known")
    sums = [f"{sum(cost.runs for cost in costs):,}", f"{sum(cost.finished for cost in costs):,}"]
    disk = f"{sum(cost.disk for cost in costs) / GIB:.1f}"
    header = ["Backbone", "methods", "runs", "finished", "hours", "disk (GiB)", "needs"]
    notes = [
        f"Hours: of what is not finished, {workers} at a time, by recorded runs and measured rates (--rates FILE); "
        f"{MISSING}: no rate of this backbone is known.",
        "Disk: adapters, probabilities of all test images and logs.",
    ]
    return Table("", header, [*rows, ["all", "", *sums, total, disk, ""]], notes, left=(0, 6))
