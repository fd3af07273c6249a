"""The pages of faults and of attacks name tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGES = TESTS.parent / "docs" / "explanation"
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def missing(text: str) -> list[str]:
    """Tests that the text names and that no file defines."""
    return [f"{file}::{name}" for file, name in NAMED.findall(text) if name not in functions_of(TESTS / file)]


@cache
def functions_of(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def rows(text: str) -> list[str]:
    """Rows of the page's tables of tests, without their heads."""
    tables = re.findall(r"^\|[^\n]*\| tests \|\n\|---[^\n]*\n((?:\|[^\n]*\n)*)", text, flags=re.MULTILINE)
    return [row for table in tables for row in table.splitlines()]


@pytest.mark.parametrize("page", ["faults.md", "attacks.md"])
def test_every_row_has_a_test_that_exists(page: str) -> None:
    text = (PAGES / page).read_text(encoding="utf-8")
    assert missing(text) == []
    assert rows(text)
    assert [row for row in rows(text) if not NAMED.search(row)] == []


def test_a_test_that_is_not_there_is_missed() -> None:
    assert missing(
        "| fault | now | `docs/test_named_tests.py::test_nothing_of_the_kind`, `docs/nowhere.py::test_x` |"
    ) == [
        "docs/test_named_tests.py::test_nothing_of_the_kind",
        "docs/nowhere.py::test_x",
    ]
