"""What a run shows on a terminal, in a pipe and in its log."""

import io
import re

import pytest
from helpers import runs

from mambapeft_vision.engine.callbacks import ProgressLine
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.progress import ConsoleProgress, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    """Standard output on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def a_capable_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def shown_at_the_end(text: str) -> str:
    """What stands on a terminal after `text`."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\??[0-9;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part != "\r" and not part.startswith("\x1b"):
            lines[row] += part
    return "\n".join(lines).strip()


def test_a_live_line_is_rewritten_and_gone_before_the_next_line(tmp_path):
    terminal = Terminal()
    with Console(tmp_path / "log", terminal) as console:
        console.live("one")
        console.live("two")
        console.say("done")
        console.live("three")
    text = terminal.getvalue()
    assert all(word in text for word in ("one", "two", "three"))
    assert shown_at_the_end(text).strip() == "done"
    assert (tmp_path / "log").read_text() == "done\n"


def test_a_live_line_is_cut_at_the_edge():
    terminal = Terminal()
    with Console(None, terminal) as console:
        console.live("x" * 300)
        assert "x" * 99 in terminal.getvalue() and "x" * 101 not in terminal.getvalue()


def test_without_a_terminal_there_is_a_line_for_each_note(tmp_path):
    for stream, shown in ((io.StringIO(), "epoch\n"), (Terminal(), "")):
        with Console(tmp_path / "log", stream) as console:
            console.live("never in a pipe")
            console.note("epoch")
        assert shown_at_the_end(stream.getvalue()).strip() == shown.strip()
    assert (tmp_path / "log").read_text() == "epoch\nepoch\n"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_an_output_that_cannot_be_written_ends_nothing(tmp_path, on_terminal):
    stream = Full()
    stream.isatty = lambda: on_terminal
    with Console(tmp_path / "log", stream) as console:
        console.live("one")
        console.say("done")
        console.note("epoch")
    ConsoleProgress("x", "images", stream)(Progress(1, 1, 1.0))
    assert (tmp_path / "log").read_text() == "done\nepoch\n"


def test_what_ended_a_run_is_in_its_log(tmp_path):
    try:
        with Console(tmp_path / "log", io.StringIO()):
            raise RuntimeError("the reason")
    except RuntimeError:
        pass
    assert (tmp_path / "log").read_text() == "stopped by RuntimeError: the reason\n"


def test_progress_of_training_and_test_on_a_terminal(tmp_path, monkeypatch):
    task = runs.lay_out_task(tmp_path / "task")
    terminal = Terminal()
    monkeypatch.setattr(ProgressLine, "INTERVAL_S", 0)
    monkeypatch.setattr("sys.stdout", terminal)
    runs.run(runs.overrides(task, tmp_path, "trainer.max_epochs=2"))
    shown = terminal.getvalue()
    for epoch in (1, 2):
        for step in (1, 2, 3):
            assert re.search(rf"epoch {epoch}/2  step {step}/3  [\d,]+ images/s  \d+:\d\d left", shown)
    assert re.search(r"test batch 1/1  [\d,]+ images/s  0:00 left", shown)
    assert "accuracy" in shown_at_the_end(shown)
