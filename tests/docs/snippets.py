"""Marked code blocks of the documentation, and a place to run them: an empty folder and this process.

A bash block runs in bash. `mambapeft` in it is a call of the command line in this process, which has PyTorch loaded.
"""

import contextlib
import io
import os
import re
import select
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SNIPPET = re.compile(
    r"^<!-- snippet: (run|run slowly|file (\S+)) -->\n```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL
)
# Sends its folder and arguments to this process, and waits for output and exit code.
PROGRAM = """#!/bin/bash
printf '%s\\0' "$#" "$PWD" "$@" > "{folder}/request"
read -r code < "{folder}/answer"
cat "{folder}/stdout"
cat "{folder}/stderr" >&2
exit "$code"
"""


@dataclass(frozen=True)
class Snippet:
    """A marked block. file: where it is to be written; None: it is run. slow: it takes many seconds."""

    language: str
    code: str
    file: str | None
    slow: bool = False


def snippets_of(page: Path) -> list[Snippet]:
    """The marked blocks of a page in their order."""
    return [
        Snippet(found[3], found[4], found[2], "slowly" in found[1])
        for found in SNIPPET.finditer(page.read_text(encoding="utf-8"))
    ]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Place:
    """The folder that a page's blocks share.

    Args:
        folder: an empty one; it becomes the working directory while a block runs.
        pipes: another one, for the program `mambapeft`.
    """

    def __init__(self, folder: Path, pipes: Path) -> None:
        self.folder, self.pipes = folder, pipes
        for name in ("request", "answer"):
            os.mkfifo(pipes / name)
        (pipes / "bin").mkdir()
        program = pipes / "bin" / "mambapeft"
        program.write_text(PROGRAM.format(folder=pipes))
        program.chmod(0o755)

    def use(self, snippet: Snippet) -> None:
        """Writes or runs a block. Raises what Python raises, and AssertionError for an exit code but 0."""
        if snippet.file is not None:
            target = self.folder / snippet.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(snippet.code, encoding="utf-8")
            return
        with _chdir(self.folder):
            self._bash(snippet.code) if snippet.language == "bash" else run_python(snippet.code)

    def _bash(self, code: str) -> None:
        environment = {**os.environ, "PATH": f"{self.pipes / 'bin'}:{os.environ['PATH']}"}
        with open(self.pipes / "output", "w+") as output:
            shell = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", code], env=environment, stdout=output, stderr=output
            )
            request = os.open(self.pipes / "request", os.O_RDWR)  # as a writer too: it then never ends
            try:
                while shell.poll() is None:
                    if select.select([request], [], [], 0.05)[0]:
                        self._answer(_arguments(request))
            finally:
                shell.kill()
                os.close(request)
            output.seek(0)
            assert shell.wait() == 0, f"{code}\n{output.read()}"

    def _answer(self, arguments: list[str]) -> None:
        folder, *command = arguments
        with (
            open(self.pipes / "stdout", "w") as out,
            open(self.pipes / "stderr", "w") as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _chdir(Path(folder)),
        ):
            code = call(command)
        (self.pipes / "answer").write_text(f"{code}\n")


def call(command: list[str]) -> int:
    """Calls `mambapeft` in this process → its exit code."""
    from mambapeft_vision.cli import main
    from mambapeft_vision.run.exit import run_cli

    try:
        run_cli(lambda: main(command))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run_python(code: str) -> None:
    """Runs a block as a module of its own, as a script would be."""
    module = types.ModuleType("snippet")
    sys.modules["snippet"] = module  # where timm and dataclasses look for what the block defines
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "<snippet>", "exec"), vars(module))
    finally:
        del sys.modules["snippet"]


def _arguments(request: int) -> list[str]:
    """The folder and the arguments that the program `mambapeft` was called with."""
    received = b""
    while True:
        received += os.read(request, 65536)
        count, *rest = received.split(b"\0")
        if len(rest) == int(count or b"0") + 2 and not rest[-1]:
            return [part.decode() for part in rest[:-1]]


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
