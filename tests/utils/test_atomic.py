"""What a file written whole waits for."""

import os

import pytest

from mambapeft_vision.utils.atomic import write_text


@pytest.mark.parametrize("flush, waits", [(True, 2), (False, 0)])  # for the file and its folder
def test_only_a_flushed_file_waits_for_the_disk(tmp_path, monkeypatch, flush, waits):
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    write_text(tmp_path / "a.txt", "text", flush=flush)
    assert (tmp_path / "a.txt").read_text() == "text"
    assert len(calls) == waits
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
