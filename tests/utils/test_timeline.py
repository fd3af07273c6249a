"""Tests of utils/timeline.py."""

import time

from mambapeft_vision.utils import timeline


def test_process_started_before_now():
    age = time.monotonic() - timeline.process_started()
    assert 0.01 <= age < 86_400  # this process has imported pytest by now


def test_marks_in_their_order_with_seconds_from_the_beginning(monkeypatch):
    clock = iter([100.0, 101.26, 103.5])
    monkeypatch.setattr(timeline.time, "monotonic", lambda: next(clock))
    timeline.begin()
    timeline.mark("imports")
    timeline.mark("first step")
    assert timeline.reached() == "imports 1.3, first step 3.5"


def test_begin_forgets_marks():
    timeline.mark("imports")
    timeline.begin()
    assert timeline.reached() == ""
