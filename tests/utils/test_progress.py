"""Progress: rates, time left, and what gets printed where."""

import io

import pytest

from mambapeft_vision.utils.progress import ConsoleProgress, Progress, ProgressMeter, format_duration


def test_rate_and_time_left():
    progress = Progress(done=30, total=120, seconds=6.0, resumed=0)
    assert progress.rate == 5.0 and progress.eta_seconds == 18.0
    assert Progress(done=90, total=120, seconds=6.0, resumed=60).rate == 5.0
    assert Progress(0, 120, 0.0).eta_seconds is None and Progress(30, None, 6.0).eta_seconds is None


def test_the_meter_reports_now_and_then_and_always_at_the_end():
    times = iter([0.0, 0.1, 0.6, 0.7, 0.8])
    reports = []
    meter = ProgressMeter(4, reports.append, interval=0.5, clock=lambda: next(times))
    for _ in range(4):
        meter.advance()
    assert [(report.done, report.seconds) for report in reports] == [(2, 0.6), (4, 0.8)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_a_log_gets_few(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    reports = [Progress(done, 1200, done / 100) for done in range(100, 1201, 100)]
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        show = ConsoleProgress("train", "images", stream)
        for report in reports:
            show(report)
    assert terminal.getvalue().count("train: 1,100/1,200 images, 100.0 images/s, 0:01 left") == 1
    assert terminal.getvalue().count("\n") == 1  # one line, rewritten, and left when all is done
    assert log.getvalue().splitlines() == [
        "train: 100/1,200 images, 100.0 images/s, 0:11 left",
        "train: 1,100/1,200 images, 100.0 images/s, 0:01 left",
        "train: 1,200/1,200 images, 100.0 images/s, 0:00 left",
    ]


def test_bytes_are_shown_as_megabytes():
    log = io.StringIO()
    ConsoleProgress("downloading", "B", log)(Progress(50_000_000, None, 10.0))
    assert log.getvalue() == "downloading: 50/? MB, 5.0 MB/s\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75.2, "1:15"), (3700, "1:01:40")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
