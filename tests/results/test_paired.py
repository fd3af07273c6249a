"""Paired comparisons against numbers computed by hand, and against what repeated experiments show."""

import random
import statistics
from dataclasses import replace

import pytest
from helpers.fake_records import CONFIGS, fake_record

from mambapeft_vision.results.compare import holm, paired
from mambapeft_vision.results.tables import Row, collect, read_standard

TASKS = ("mini/one", "mini/two")
ANY = fake_record("mini/one", "a", 0, 0.5)


def row(accuracies: dict[str, list[float | None]]) -> Row:
    """From accuracies by task, in the order of seeds; None: not done."""
    runs = {(task, s): v for task, values in accuracies.items() for s, v in enumerate(values) if v is not None}
    return Row("a", {}, {(t, s): replace(ANY, task=t, seed=s, accuracy=value) for (t, s), value in runs.items()})


def test_the_difference_and_its_interval_by_hand():
    a = row({"mini/one": [0.50, 0.52, 0.54], "mini/two": [0.80, 0.80, 0.83]})
    b = row({"mini/one": [0.49, 0.50, 0.51], "mini/two": [0.79, 0.81, 0.80]})
    found = paired(a, b, TASKS)
    # differences: 1, 2, 3 (mean 2, variance 1) and 1, -1, 3 (mean 1, variance 4)
    assert found.mean == pytest.approx(1.5)
    # error² = (1/3 + 4/3) / 4 = 5/12; freedom = (5/3)² / ((1/3)²/2 + (4/3)²/2) = 50/17 = 2.94; t of 0.975 there: 3.220
    assert found.half == pytest.approx(3.220 * (5 / 12) ** 0.5, rel=1e-3)
    assert not found.exceeds_noise and 0.05 < found.p < 0.2
    assert found.seed_std == pytest.approx(statistics.stdev([1.0, 0.5, 3.0]))  # the average of both tasks, seed by seed
    assert (found.won, found.tasks, found.cells) == (2, 2, 6)


def test_the_other_way_round_is_the_negative():
    a, b = row({"mini/one": [0.5, 0.6], "mini/two": [0.7, 0.7]}), row({"mini/one": [0.4, 0.6], "mini/two": [0.7, 0.7]})
    one, other = paired(a, b, TASKS), paired(b, a, TASKS)
    assert one.mean == -other.mean and one.half == other.half and one.p == other.p
    assert (one.won, other.won) == (1.5, 0.5)  # a tie is half


def test_only_common_seeds_count_and_a_task_without_any_ends_it():
    a = row({"mini/one": [0.5, 0.6, 0.9], "mini/two": [0.7, 0.9, None]})
    b = row({"mini/one": [0.4, 0.4, None], "mini/two": [0.7, None, 0.1]})
    found = paired(a, b, TASKS)
    assert found.mean == pytest.approx((15 + 0) / 2) and found.cells == 3
    assert found.seed_std is None  # unequal seeds
    # differences 10, 20 (variance 50) and 0 alone, with the same variance: error² = (50 / 2 + 50) / 4; t of 1: 12.706
    assert found.half == pytest.approx(12.706 * (75 / 4) ** 0.5, rel=1e-3)
    assert paired(a, row({"mini/one": [0.4]}), TASKS) is None


def test_one_seed_has_a_difference_but_no_interval():
    found = paired(row({"mini/one": [0.5]}), row({"mini/one": [0.4]}), TASKS[:1])
    assert found.mean == pytest.approx(10) and found.half is None and found.p is None and not found.exceeds_noise


def test_no_noise_at_all():
    same = row({"mini/one": [0.5, 0.5]})
    assert paired(same, same, TASKS[:1]).p == 1.0 and not paired(same, same, TASKS[:1]).exceeds_noise
    better = row({"mini/one": [0.75, 0.75]})
    assert paired(better, same, TASKS[:1]).exceeds_noise


def test_intervals_cover_the_truth_as_often_as_they_say():
    """13 tasks whose noise differs five-fold, 3 seeds, no true difference: 95 % of the intervals hold zero."""
    draw = random.Random(0)
    tasks = [f"mini/{i}" for i in range(13)]
    held, repetitions = 0, 400
    for _ in range(repetitions):
        a, b = (
            row({t: [draw.gauss(0.5, 0.005 * (1 + i % 5)) for _ in range(3)] for i, t in enumerate(tasks)})
            for _ in "ab"
        )
        held += not paired(a, b, tasks).exceeds_noise
    assert 0.92 < held / repetitions < 0.98  # three standard deviations of a share of 400


def test_holm_by_hand():
    # 0.05 / 3 = 0.0167 holds for 0.01; 0.05 / 2 = 0.025 does not for 0.03, and so not for what comes after it
    assert holm([0.03, None, 0.01, 0.04]) == [False, False, True, False]
    assert holm([0.02, 0.01]) == [True, True]
    assert holm([]) == []


def test_groups_come_from_the_records_where_the_family_is_not_vtab():
    groups = {"mini/usps": "natural", "mini/brain_mri": "specialized", "mini/dsprites_loc": "structured"}
    records = [fake_record(t, "a", 0, 0.1 * n, group=g) for n, (t, g) in enumerate(groups.items(), start=1)]
    records.append(fake_record("mini/fashion", "a", 0, 0.3, group="natural"))
    (collection,) = collect(records, read_standard(CONFIGS))
    assert collection.tasks == ("mini/fashion", "mini/usps", "mini/brain_mri", "mini/dsprites_loc")
    (found,) = collection.rows
    means = {name: found.average(groups).mean for name, groups in collection.columns().items()}
    assert means == pytest.approx(
        {"Natural": 20, "Specialized": 20, "Structured": 30, "Avg": (30 + 10 + 20 + 30) / 4, "Groups": 70 / 3}
    )
