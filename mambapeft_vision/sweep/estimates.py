"""How long runs will take: from runs that are recorded, or from a file of measured rates."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambapeft_vision.adapter.presets import Preset
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.run.exit import nearest
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.errors import UserError

COLUMNS = ["backbone", "preset", "train_images_per_second", "test_images_per_second"]
ANY_OTHER = "*"
NUM_TRAIN = {"train800val200": 1000, "train800": 800}  # images of a split, as VTAB-1K has them
NUM_TEST = {"val200": 200}


@dataclass(frozen=True)
class Rate:
    """Images/s of one preset on one backbone. methods: sorted names; (): of every preset without a line of its own."""

    backbone: str
    methods: tuple[str, ...]
    train: float
    test: float


class Speeds:
    """Estimates.

    Args:
        records: known runs; they count more than rates, as they are of this machine.
        rates: of `read_rates`.
    """

    def __init__(self, records: Iterable[RunRecord] = (), rates: Sequence[Rate] = ()) -> None:
        self._records = list(records)
        self._rates = rates

    def add(self, record: RunRecord) -> None:
        self._records.append(record)

    def total(self, plans: Iterable[RunPlan]) -> float | None:
        """Seconds of all runs one after another; None where one's time cannot be told."""
        estimates = [self.seconds(plan) for plan in plans]
        return None if None in estimates else sum(estimates)

    def seconds(self, plan: RunPlan) -> float | None:
        """From the runs most like it: same methods and task, same methods, a rate of its preset, any on its backbone.

        A run's training time is scaled to the number of epochs and its test to the number of test images. None where
        nothing is known of the backbone.
        """
        alike = [record for record in self._records if record.config["backbone"]["name"] == _backbone(plan)]
        same_methods = [record for record in alike if record.methods == plan.methods]
        same_task = [record for record in same_methods if record.task == plan.task]
        chosen = same_task or same_methods
        if not chosen and (rated := self._by_rate(plan)) is not None:
            return rated
        chosen = chosen or alike
        return statistics.median(_scaled(record, plan) for record in chosen) if chosen else None

    def _by_rate(self, plan: RunPlan) -> float | None:
        """Training and test alone: no start of a process, decoding or saving."""
        rates = {rate.methods: rate for rate in self._rates if rate.backbone == _backbone(plan)}
        rate = rates.get(tuple(plan.methods), rates.get(()))
        dataset = plan.config["dataset"]
        num_train = NUM_TRAIN.get(dataset["train_split"])
        num_test = NUM_TEST.get(dataset["test_split"], dataset.get("num_test"))
        if rate is None or num_train is None or num_test is None:
            return None
        return num_train * plan.recipe.max_epochs / rate.train + num_test / rate.test


def read_rates(path: str | Path, presets: Mapping[str, Preset]) -> list[Rate]:
    """Reads a CSV file such as docs/rates.csv; lines that begin with # are comments.

    Args:
        presets: configs/method, which the column `preset` names; `*` stands for all that have no line.
    Raises: UserError naming the file and the line that is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file such as docs/rates.csv") from error
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    if reader.fieldnames != COLUMNS:
        raise UserError(f"{path} has the columns {reader.fieldnames}; expected {','.join(COLUMNS)}")
    return [_rate(path, row, presets) for row in reader]


def _rate(path: str | Path, row: Mapping[str, str], presets: Mapping[str, Preset]) -> Rate:
    backbone, preset, *numbers = (row[column] for column in COLUMNS)
    if preset != ANY_OTHER and preset not in presets:
        raise UserError(f"{path}: {preset} is no preset; {nearest(preset, presets)}")
    try:
        train, test = map(float, numbers)
    except (TypeError, ValueError):
        train = test = 0.0
    if not (train > 0 and test > 0):
        raise UserError(f"{path}: {backbone}, {preset}: {numbers}; expected two numbers above 0")
    methods = () if preset == ANY_OTHER else tuple(sorted(presets[preset].methods))
    return Rate(backbone, methods, train, test)


def _backbone(plan: RunPlan) -> str:
    return plan.config["backbone"]["name"]


def _scaled(record: RunRecord, plan: RunPlan) -> float:
    test_seconds = record.num_test / record.test_images_per_second
    other_seconds = max(0.0, record.wall_seconds - record.train_seconds - test_seconds)  # loading, saving, merging
    train_seconds = record.train_seconds / record.epochs * plan.recipe.max_epochs
    num_test = record.num_test
    if plan.config["dataset"].get("test_split") == "test":
        num_test = plan.config["dataset"].get("num_test") or num_test
    return train_seconds + num_test / record.test_images_per_second + other_seconds
