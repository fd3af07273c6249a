"""The documentation's code is run: every fenced block below `<!-- snippet: run -->`, page by page, from top to bottom.

A page's blocks share an empty folder, as if the package were installed and nothing else were there.
`<!-- snippet: file PATH -->` writes the next block to that path.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SNIPPET = re.compile(r"^<!-- snippet: (run|file (\S+)) -->\n```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
# What the shell finds: this Python, and the command of the package beside this file.
PROGRAMS = {"python": "", "mambapeft": " -c 'from mambapeft_vision.cli import run; run()'"}
# Pages that train on 1,000 images. tests/sweep/test_demo.py and tests/data/prepare have both in small.
TRAIN_FOR_LONG = {"demo", "own-images"}


@dataclass(frozen=True)
class Snippet:
    """A marked block. file: where it is to be written; None: it is run."""

    language: str
    code: str
    file: str | None


def snippets_of(page: Path) -> list[Snippet]:
    """The marked blocks of a page in their order."""
    return [Snippet(found[3], found[4], found[2]) for found in SNIPPET.finditer(page.read_text(encoding="utf-8"))]


def pages_with_snippets() -> Iterator[Path]:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if snippets_of(page):
            yield page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder but for `bin`, which holds the programs."""
    for name, arguments in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        program.chmod(0o755)
    return tmp_path


def run(snippet: Snippet, folder: Path) -> None:
    command = ["bash", "-euo", "pipefail", "-c"] if snippet.language == "bash" else [sys.executable, "-c"]
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": _import_path()}
    result = subprocess.run(
        [*command, snippet.code], cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, f"{snippet.code}\n{result.stdout}\n{result.stderr}"


def _import_path() -> str:
    """This checkout's packages first, whatever is installed."""
    given = os.environ.get("PYTHONPATH")
    return ":".join([str(ROOT), str(ROOT / "kernels"), *([given] if given else [])])


def page_cases() -> Iterator[Any]:
    for page in pages_with_snippets():
        marks = [pytest.mark.exhaustive] if page.stem in TRAIN_FOR_LONG else []
        yield pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("page", list(page_cases()))
def test_the_code_of_a_page_runs(page: Path, folder: Path) -> None:
    for snippet in snippets_of(page):
        assert snippet.language in ("bash", "python") or snippet.file, (
            f"{page.name}: a {snippet.language} block cannot run"
        )
        if snippet.file is not None:
            target = folder / snippet.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(snippet.code, encoding="utf-8")
        else:
            run(snippet, folder)


def test_tutorials_have_snippets() -> None:
    found = {page.stem for page in pages_with_snippets()}
    assert {"demo", "own-images", "write-a-method"} <= found


def test_every_mark_is_understood() -> None:
    """A mark with a typing mistake would silently be no snippet."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        assert page.read_text(encoding="utf-8").count("<!-- snippet") == len(snippets_of(page)), page
