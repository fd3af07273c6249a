"""Values of the wrong type in the sections whose keys are a class's arguments."""

import pytest
from helpers import runs

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import expected_kind


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.batch_size=abc", r"dataset\.batch_size='abc'; expected a whole number"),
        ("dataset.batch_size=2.5", r"dataset\.batch_size=2\.5; expected a whole number"),
        ("dataset.batch_size=null", r"dataset\.batch_size=None; expected a whole number"),
        ("dataset.num_workers=many", r"dataset\.num_workers='many'; expected a whole number or null"),
        ("dataset.folder=5", r"dataset\.folder=5; expected null or text"),
        ("dataset.num_classes=true", r"dataset\.num_classes=True; expected a whole number"),
        ("method.lora_p_x.rank=abc", r"method\.lora_p_x\.rank='abc'; expected a whole number"),
        ("method.lora_p_x.scale=[1]", r"method\.lora_p_x\.scale=\[1\]; expected a number"),
        ("logger=wandb logger.mode=3", r"logger\.mode=3; expected text"),
    ],
)
def test_is_refused_with_what_wasexpected_kind(task, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        runs.run(runs.overrides(task, tmp_path, *override.split()))


def test_words():
    assert expected_kind(1, float) is None and expected_kind(1.5, int) == "a whole number"
    assert expected_kind(True, int) == "a whole number" and expected_kind(1, bool) == "true or false"
    assert expected_kind(["a"], str | list[str]) is None and expected_kind([1], str | list[str]) == "a list or text"
    assert expected_kind(object(), dict) is None
