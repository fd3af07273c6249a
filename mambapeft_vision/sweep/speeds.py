"""How long a run will take, from the runs that are recorded."""

import statistics
from collections.abc import Sequence

from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.training.plan import RunPlan


def estimate_seconds(plan: RunPlan, records: Sequence[RunRecord]) -> float | None:
    """From the recorded runs most like it: same methods and task, else same methods, else any on its backbone.

    Each one's training time is scaled to the number of epochs and its test to the number of test images.
    None where no run of the backbone is recorded.
    """
    alike = [record for record in records if record.config["backbone"]["name"] == plan.config["backbone"]["name"]]
    same_methods = [record for record in alike if record.methods == plan.methods]
    same_task = [record for record in same_methods if record.task == plan.task]
    chosen = same_task or same_methods or alike
    return statistics.median(_scaled(record, plan) for record in chosen) if chosen else None


def _scaled(record: RunRecord, plan: RunPlan) -> float:
    test_seconds = record.num_test / record.test_images_per_second
    other_seconds = max(0.0, record.wall_seconds - record.train_seconds - test_seconds)  # loading, saving, merging
    train_seconds = record.train_seconds / record.epochs * plan.recipe.max_epochs
    num_test = record.num_test
    if plan.config["dataset"].get("test_split") == "test":
        num_test = plan.config["dataset"].get("num_test") or num_test
    return train_seconds + num_test / record.test_images_per_second + other_seconds
