"""The end of the demo: a small table, a picture, and a sentence that compares the three runs."""

from collections.abc import Mapping
from pathlib import Path

from mambapeft_vision.results.plots import accuracy_against_parameters, drawn, save_png
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables import Collection, summary_table, to_markdown


def show(collection: Collection, picture: Path) -> str:
    """The table as text; accuracy against trained parameters is drawn to `picture`, a PNG."""
    table = to_markdown(summary_table(collection))
    content = drawn(picture.name, lambda: accuracy_against_parameters(collection))
    if content is None:
        return f"\n{table}"
    save_png(content, picture)
    return f"\n{table}\npicture: {picture}"


def compare(records: Mapping[str, RunRecord]) -> str:
    """LoRA_p(X) beside the two others, as measured, whichever is better.

    Args:
        records: records of `linear_probe`, `lora_p_x` and `full`.
    """
    probe, lora, full = (records[name] for name in ("linear_probe", "lora_p_x", "full"))
    return (
        f"LoRA_p(X) trains {lora.trainable / full.trainable:.1%} of the backbone's parameters; its accuracy is "
        f"{_difference(lora, probe)} linear probing's and {_difference(lora, full)} full fine-tuning's "
        "at the same learning rate."
    )


def _difference(one: RunRecord, other: RunRecord) -> str:
    points = 100 * (one.accuracy - other.accuracy)
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}" if points else "the same as"
