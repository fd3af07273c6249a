"""What the documentation shows of code and measurements is up to date."""

import csv
import re
from pathlib import Path

import pytest

from mambapeft_vision.engine.config import TrainerConfig

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("generators")


def test_pictures_are_those_of_their_data() -> None:
    from pictures import draw

    for path, content in draw():
        assert path.read_text(encoding="utf-8") == content, f"run python docs/generate/pictures.py ({path.name})"


@pytest.mark.slow
def test_the_summary_of_the_mini_benchmark_is_that_of_its_runs() -> None:
    from mini_benchmark import summary
    from pictures import rows

    assert rows("mini.csv") == summary(), "run python docs/generate/mini_benchmark.py"


def test_the_readmes_table_is_that_of_the_runs() -> None:
    from pictures import rows

    measured = {row["method"]: row for row in rows("mini.csv")}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    assert len(shown) > 4
    for name, trained, *accuracies in shown:
        row = measured[name]
        assert [trained.replace(",", ""), *accuracies] == [row["trained"], row["accuracy"], row["tuned"]]


def test_config_keys_have_types_defaults_and_meanings() -> None:
    from reference import schema_keys

    text = schema_keys("train", "trainer")
    for field in TrainerConfig.__dataclass_fields__:
        assert f"| `trainer.{field}` |" in text
    assert "| `trainer.clip_norm` | float or null | `5.0` |" in text
    assert "| `paths.cache` |" in schema_keys("train") and "trainer.eps" not in schema_keys("train")


def test_keys_of_a_group_have_the_comments_beside_and_above_them(tmp_path: Path) -> None:
    from reference import Key, keys_of

    file = tmp_path / "group.yaml"
    file.write_text("# The file.\n_target_: a.B\nx: 1 # beside\n# above,\n# two lines\ny:\n  z: [1, 2]\n")
    assert list(keys_of(file)) == [Key("x", "1", "beside"), Key("y.z", "[1, 2]", "")]


def test_csv_files_have_cells_for_all_columns() -> None:
    for path in (ROOT / "docs").glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(line for line in file if not line.startswith("#"))
        assert lines and all(len(line) == len(header) for line in lines), path.name
