"""The verdict of `make check-science`, and the demo's sentence."""

from dataclasses import replace

import pytest
from helpers.fake_records import fake_record

from mambapeft_vision.results.compare import ordering
from mambapeft_vision.results.demo import compare
from mambapeft_vision.utils.errors import UserError

EXPECTED = ("scratch", "linear_probe", "lora_p_x")


def records(**accuracies):
    """Two tasks, two seeds; accuracies: four of each method, in this order."""
    pairs = [("mini/one", 0), ("mini/one", 1), ("mini/two", 0), ("mini/two", 1)]
    return [
        fake_record(task, preset, seed, accuracy)
        for preset, values in accuracies.items()
        for (task, seed), accuracy in zip(pairs, values)
    ]


GOOD = {"scratch": [0.1, 0.2, 0.3, 0.4], "linear_probe": [0.1, 0.2, 0.3, 0.5], "lora_p_x": [0.1, 0.1, 0.4, 0.6]}


def test_the_order_is_that_of_the_means():
    """Single runs may be the other way round."""
    verdict = ordering(records(**GOOD, full=[0.0] * 4), EXPECTED)
    assert verdict.means == pytest.approx({"scratch": 25.0, "linear_probe": 27.5, "lora_p_x": 30.0})
    assert not verdict.broken and "holds" in str(verdict) and "27.50" in str(verdict)


def test_groups_of_tasks_count_alike():
    """One natural task and three structured ones: the mean over tasks would be the other way round."""
    found = {"scratch": [0.1, 0.5, 0.5, 0.5], "full": [0.6, 0.4, 0.4, 0.4]}
    every = []
    for preset, accuracies in found.items():
        for number, accuracy in enumerate(accuracies):
            record = fake_record(f"mini/{number}", preset, 0, accuracy)
            every.append(replace(record, group="structured" if number else "natural"))
    assert ordering(every, ("scratch", "full")).means == pytest.approx({"scratch": 30.0, "full": 50.0})


@pytest.mark.parametrize(
    ("worse", "broken"),
    [
        ({"lora_p_x": [0.1, 0.2, 0.3, 0.4]}, ("linear_probe", "lora_p_x")),
        ({"scratch": [0.2, 0.3, 0.4, 0.5]}, ("scratch", "linear_probe")),
        ({"linear_probe": GOOD["scratch"]}, ("scratch", "linear_probe")),  # level is lost as well
    ],
)
def test_a_lost_order_names_the_methods(worse, broken):
    verdict = ordering(records(**GOOD | worse), EXPECTED)
    assert verdict.broken == (broken,)
    assert "LOST" in str(verdict) and f"{broken[0]} is not below {broken[1]}" in str(verdict)


def test_missing_runs_give_no_verdict():
    with pytest.raises(UserError, match="lora_p_x has 3 runs"):
        ordering(records(**GOOD)[:-1], EXPECTED)
    with pytest.raises(UserError, match="there are no runs"):
        ordering([], EXPECTED)


def test_the_demo_says_what_was_measured():
    def sentence(lora):
        three = {"linear_probe": 0.8, "lora_p_x": lora, "full": 0.9}
        found = {name: fake_record("mini/digits", name, 0, value) for name, value in three.items()}
        return compare(found)

    assert "7.0% of the backbone's" in sentence(0.85)
    assert "5.0 points above linear probing's and 5.0 points below full fine-tuning's" in sentence(0.85)
    assert "10.0 points below linear probing's" in sentence(0.7)
    assert "the same as linear probing's" in sentence(0.8)
