"""Estimates of how long runs take: from recorded runs, or from a file of measured rates."""

import csv
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambapeft_vision.adapter.presets import Preset
from mambapeft_vision.results.record import RunRecord, is_derived
from mambapeft_vision.run.exit import nearest
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import read_text

COLUMNS = ["backbone", "preset", "train_images_per_second", "test_images_per_second"]
ANY_OTHER = "*"
_MOST_BYTES = 1_000_000
RECENT = 25  # results that an estimate is made from, the latest of those most alike
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
    """Estimates, each from at most `RECENT` results: an estimate costs the same however many runs there were.

    Args:
        records: known runs; they take precedence over rates, because they were measured on this machine.
        rates: measured images/s, from `read_rates`.
    """

    def __init__(self, records: Iterable[RunRecord] = (), rates: Sequence[Rate] = ()) -> None:
        self._alike: dict[tuple[object, ...], deque[RunRecord]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._rates = {(rate.backbone, rate.methods): rate for rate in reversed(rates)}
        for record in sorted(records, key=lambda record: record.finished_at):
            self.add(record)

    def add(self, record: RunRecord) -> None:
        """Adds the result of a run that has just ended. Results made without training are ignored."""
        if is_derived(record):
            return
        for key in _likeness(str(record.config["backbone"].get("name")), record.methods, record.task):
            self._alike[key].append(record)

    def total(self, plans: Iterable[RunPlan]) -> float | None:
        """Seconds of all runs one after another; None if the time of one cannot be estimated."""
        total = 0.0
        for plan in plans:
            seconds = self.seconds(plan)
            if seconds is None:
                return None
            total += seconds
        return total

    def seconds(self, plan: RunPlan) -> float | None:
        """Seconds of one run, from the runs most like it.

        In this order: same methods and task, same methods, a rate of its preset, any run on its backbone.

        A run's training time is scaled to the number of epochs and its test to the number of test images. None where
        nothing is known of the backbone.
        """
        same_task, same_methods, same_backbone = _likeness(_backbone(plan), plan.methods, plan.task)
        for key in (same_task, same_methods):
            if key in self._alike:
                return self._median(key, plan)
        rated = self._by_rate(plan)
        if rated is None and same_backbone in self._alike:
            return self._median(same_backbone, plan)
        return rated

    def _median(self, key: tuple[object, ...], plan: RunPlan) -> float:
        return statistics.median(_scaled(record, plan) for record in self._alike[key])

    def _by_rate(self, plan: RunPlan) -> float | None:
        """Seconds by measured rates: training and test, without a process's start, decoding or saving."""
        backbone = _backbone(plan)
        rate = self._rates.get((backbone, tuple(plan.methods)), self._rates.get((backbone, ())))
        dataset = plan.config["dataset"]
        num_train = NUM_TRAIN.get(dataset["train_split"])
        num_test = NUM_TEST.get(dataset["test_split"], dataset.get("num_test"))
        if rate is None or num_train is None or num_test is None:
            return None
        return num_train * plan.recipe.max_epochs / rate.train + num_test / rate.test


def _likeness(backbone: str, methods: Sequence[str], task: str) -> tuple[tuple[object, ...], ...]:
    """Classes of runs, the most alike first."""
    return (backbone, tuple(methods), task), (backbone, tuple(methods)), (backbone,)


def read_rates(path: str | Path, presets: Mapping[str, Preset]) -> list[Rate]:
    """Reads a CSV file such as docs/rates.csv; lines that begin with # are comments.

    Args:
        presets: configs/method, which the column `preset` names; `*` stands for all that have no line.
    Raises: UserError naming the file and the line that is wrong.
    """
    try:
        lines = read_text(path, max_bytes=_MOST_BYTES).splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file such as docs/rates.csv") from error
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    try:
        if reader.fieldnames != COLUMNS:
            raise UserError(f"{path} has the columns {shown(reader.fieldnames)}; expected {','.join(COLUMNS)}")
        return [_rate(path, row, presets) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} is no table ({plain(error)}); expected a file such as docs/rates.csv") from None


def _rate(path: str | Path, row: Mapping[str, str], presets: Mapping[str, Preset]) -> Rate:
    backbone, preset, *numbers = (row[column] for column in COLUMNS)
    if preset != ANY_OTHER and preset not in presets:
        raise UserError(f"{path}: {shown(preset)} is no preset; {nearest(str(preset), presets)}")
    try:
        train, test = map(float, numbers)
    except (TypeError, ValueError):
        train = test = 0.0
    if not (0 < train < math.inf and 0 < test < math.inf):
        raise UserError(f"{path}: {shown([backbone, preset, *numbers])}; expected two numbers above 0")
    methods = () if preset == ANY_OTHER else tuple(sorted(presets[preset].methods))
    return Rate(backbone, methods, train, test)


def _backbone(plan: RunPlan) -> str:
    return plan.config["backbone"]["name"]


def _scaled(record: RunRecord, plan: RunPlan) -> float:
    rate = record.test_images_per_second or math.inf
    other_seconds = max(0.0, record.wall_seconds - record.train_seconds - record.num_test / rate)  # loading, saving, …
    train_seconds = record.train_seconds / max(1, record.epochs) * plan.recipe.max_epochs
    num_test = record.num_test
    if plan.config["dataset"].get("test_split") == "test":
        num_test = plan.config["dataset"].get("num_test") or num_test
    return train_seconds + num_test / rate + other_seconds
