"""What the documentation shows of code and measurements is up to date."""

import csv
import re
from pathlib import Path

import pytest

from mambapeft_vision.run import config

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("generators")


def test_pictures_are_those_of_their_data() -> None:
    from pictures import draw

    for path, content in draw():
        assert path.read_text(encoding="utf-8") == content, f"run python docs/generate/pictures.py ({path.name})"


@pytest.mark.slow
def test_the_summary_of_the_mini_benchmark_is_that_of_its_runs() -> None:
    from mini_benchmark import recipe_summary
    from pictures import rows

    assert rows("mini.csv") == recipe_summary(), "run python docs/generate/mini_benchmark.py"


def test_the_readmes_table_is_that_of_the_runs() -> None:
    from pictures import rows

    measured = {row["method"]: row for row in rows("mini.csv")}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    assert len(shown) > 4
    for name, trained, accuracy in shown:
        assert (trained.replace(",", ""), accuracy) == (measured[name]["trained"], measured[name]["accuracy"])


def test_config_keys_have_types_and_defaults() -> None:
    from reference import CONFIGS, config_keys, keys_of

    keys = {key.path: key for key in keys_of(CONFIGS / "trainer" / "default.yaml")}
    assert set(keys) == set(config.TrainerConfig.__dataclass_fields__)
    assert keys["max_epochs"].value == "100" and "recipe of MambaPEFT" not in keys["max_epochs"].comment
    text = config_keys("trainer/default.yaml", "TrainerConfig", "trainer.")
    assert "| `trainer.clip_norm` | `float or None` | `5.0` | largest global gradient norm" in text


def test_described_arguments() -> None:
    from reference import described_arguments

    text = "Title.\n\nArgs:\n    a, b: two things\n        in two lines.\n    c: one.\nReturns: x."
    assert described_arguments(text) == {"a": "two things in two lines.", "b": "two things in two lines.", "c": "one."}


def test_csv_files_have_cells_for_all_columns() -> None:
    for path in (ROOT / "docs").glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(line for line in file if not line.startswith("#"))
        assert lines and all(len(line) == len(header) for line in lines), path.name
