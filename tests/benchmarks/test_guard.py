"""The guard of the training speed: what counts as slower, and its record."""

from dataclasses import replace

import pytest

from mambapeft_vision.benchmarks import guard
from mambapeft_vision.benchmarks.training import GUARD_FILE
from mambapeft_vision.utils.errors import UserError

ROW = {"backbone": "vim_s", "method": "lora_p_x", "batch": 32, "train_images_per_s": 3000, "peak_gib": 3.2}
BEFORE = guard.measurement("card, fast", ROW, 2.0, "card, commit 0123456789")


def test_a_rate_is_told_in_units_of_the_reference():
    assert BEFORE.images_per_reference == 6.0
    slower_card = guard.measurement("card, fast", {**ROW, "train_images_per_s": 1500}, 4.0, "card")
    assert guard.compare([BEFORE], [slower_card])[1]


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({"images_per_s": 2950.0}, True),
        ({"images_per_s": 2850.0}, False),
        ({"images_per_s": 3500.0}, True),
        ({"peak_gib": 3.5}, False),
    ],
)
def test_what_counts_as_worse(change, holds):
    (line,), found = guard.compare([BEFORE], [replace(BEFORE, **change)])
    assert found == holds and line.startswith("holds" if holds else "WORSE")


def test_another_card_is_not_compared():
    with pytest.raises(UserError, match="no record on another"):
        guard.compare([BEFORE], [replace(BEFORE, card="another")])


def test_the_record_is_written_and_read_again(tmp_path):
    file = tmp_path / "guard.csv"
    guard.write_measurements(file, [BEFORE, replace(BEFORE, batch=256)])
    newer = replace(BEFORE, images_per_s=3100.0, measured="card, another commit")
    guard.write_measurements(file, [newer])
    assert guard.read_measurements(file) == [newer, replace(BEFORE, batch=256)]
    assert guard.read_measurements(tmp_path / "none.csv") == []
    assert guard.read_measurements(GUARD_FILE)
