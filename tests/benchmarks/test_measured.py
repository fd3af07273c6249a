"""CSV files of measurements say what they were measured with."""

import csv

from mambapeft_vision.benchmarks.measured import STAMP, write_rows


def test_the_first_line_names_machine_versions_commit_and_day(tmp_path, monkeypatch):
    monkeypatch.setattr("mambapeft_vision.benchmarks.measured.git_state", lambda: ("0123456789abcdef", True))
    monkeypatch.setattr("mambapeft_vision.benchmarks.measured.device_name", lambda device: "A card, fast")
    write_rows(tmp_path / "new" / "speed.csv", [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}])
    with open(tmp_path / "new" / "speed.csv", newline="") as file:
        first, *rest = file.read().splitlines()
    assert first.startswith(f"{STAMP}A card, fast, Python 3.")
    assert "PyTorch " in first and "commit 0123456789 with changes, 20" in first
    assert list(csv.DictReader(rest)) == [{"a": "1", "b": "x,y"}, {"a": "2", "b": ""}]
