"""What a run shows on a terminal, in a pipe and in its log."""

import io
import re

from helpers import runs

from mambapeft_vision.engine.callbacks import ProgressLine
from mambapeft_vision.utils.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_live_line_is_rewritten_and_gone_before_the_next_line(tmp_path):
    terminal = Terminal()
    with Console(tmp_path / "log", terminal) as console:
        console.live("one")
        console.live("two")
        console.say("done")
        console.live("three")
    assert terminal.getvalue() == "\r\033[Kone\r\033[Ktwo\r\033[Kdone\n\r\033[Kthree\r\033[K"
    assert (tmp_path / "log").read_text() == "done\n"


def test_without_a_terminal_there_is_a_line_for_each_note(tmp_path):
    for stream, shown in ((io.StringIO(), "epoch\n"), (Terminal(), "")):
        with Console(tmp_path / "log", stream) as console:
            console.live("never in a pipe")
            console.note("epoch")
        assert re.sub(r"\r\x1b\[K[^\r]*", "", stream.getvalue()) == shown
    assert (tmp_path / "log").read_text() == "epoch\nepoch\n"


def test_what_ended_a_run_is_in_its_log(tmp_path):
    try:
        with Console(tmp_path / "log", io.StringIO()):
            raise RuntimeError("the reason")
    except RuntimeError:
        pass
    assert (tmp_path / "log").read_text() == "stopped by RuntimeError: the reason\n"


def test_progress_of_training_and_test_on_a_terminal(task, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(ProgressLine, "INTERVAL_S", 0)
    monkeypatch.setattr("sys.stdout", terminal)
    runs.run(runs.overrides(task, tmp_path, "trainer.max_epochs=2"))
    shown = terminal.getvalue()
    for epoch in (1, 2):
        for step in (1, 2, 3):
            assert re.search(rf"\x1b\[Kepoch {epoch}/2  step {step}/3  [\d,]+ images/s  \d+:\d\d left", shown)
    assert re.search(r"\x1b\[Ktest batch 1/1  [\d,]+ images/s  0:00 left", shown)
    assert "accuracy" in shown.rpartition("\033[K")[2]
