"""Commands that the documentation shows exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs.snippets import snippets_of

from mambapeft_vision.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = ("README.md", "CONTRIBUTING.md", "data/README.md", "results/README.md")
PAGES = [*(ROOT / name for name in TOP_LEVEL), *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = {snippet.file for page in PAGES for snippet in snippets_of(page)}  # files that a page tells to save
SHOWN = re.compile(r"(?:^|[\s`\"(])(mambapeft|make|python) +([\w./-]+)", flags=re.MULTILINE)


def code_of(page: Path) -> Iterator[str]:
    """Code blocks, fenced or indented, and code inside of sentences."""
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"^```(?:bash|text)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"^    (.+)$", text, flags=re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def commands_of(page: Path) -> set[tuple[str, str]]:
    return {found for code in code_of(page) for found in SHOWN.findall(code)}


def exists(program: str, argument: str) -> bool:
    if argument in ("COMMAND", "-m", "-c", "--help"):
        return True
    if program == "mambapeft":
        return argument in COMMANDS
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return argument in targets
    return (ROOT / argument).is_file() or argument in {"scripts/", *WRITTEN}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    assert [command for command in commands_of(page) if not exists(*command)] == []


def test_the_readme_shows_commands() -> None:
    found = commands_of(ROOT / "README.md")
    assert {("mambapeft", "demo"), ("mambapeft", "train"), ("make", "install")} <= found


def test_a_command_that_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Run\n\n    mambapeft fly method=a\n    make coffee\n    python scripts/nothing.py\n")
    assert len([command for command in commands_of(page) if not exists(*command)]) == 3
