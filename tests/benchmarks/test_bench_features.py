"""scripts/bench_features.py on a task that anything can tell apart, and on one that nothing can."""

import csv

import pytest
import torch
from PIL import Image

from mambapeft_vision.benchmarks.features import main, probe
from mambapeft_vision.utils.errors import UserError


def _task(folder, label_of):
    (folder / "images").mkdir(parents=True)
    for number in range(8):
        grey = (20 if number < 4 else 200) + number
        Image.new("RGB", (32, 32), (grey, grey, grey)).save(folder / f"images/{number}.png")
    lines = "".join(f"images/{number}.png {label_of(number)}\n" for number in range(8))
    for split in ("train800val200", "test"):
        (folder / f"{split}.txt").write_text(lines)


def test_a_column_for_each_file_of_weights(tmp_path, capsys):
    _task(tmp_path / "data/bright", lambda number: int(number > 3))
    main(["--data", str(tmp_path / "data"), "--csv", str(tmp_path / "found.csv")])
    assert "bright,100.0,100.0" in capsys.readouterr().out  # the package's weights and random ones
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()[1:]))
    assert rows[-1] == {"task": "**mean of 1**", "official": "**100.0**", "random": "**100.0**"}


def test_labels_without_any_reason_are_guessed():
    torch.manual_seed(0)
    draw = [(torch.randn(500, 4), torch.randint(2, (500,))) for _ in range(2)]
    assert probe(*draw) == pytest.approx(50, abs=7)


def test_no_task_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no task found. Run `mambapeft prepare mini all"):
        main(["--data", str(tmp_path)])
