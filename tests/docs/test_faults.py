"""The page of faults names tests that exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "explanation" / "faults.md"
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def missing(text: str) -> list[str]:
    """Tests that the text names and that no file defines."""
    return [f"{file}::{name}" for file, name in NAMED.findall(text) if name not in functions_of(TESTS / file)]


def functions_of(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def rows(text: str) -> list[str]:
    """Rows of the page's tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line for line in lines if not line.startswith(("|---", "| fault |"))]


def test_every_fault_has_a_test_that_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert missing(text) == []
    assert rows(text)
    assert [row for row in rows(text) if not NAMED.search(row)] == []


def test_a_test_that_is_not_there_is_missed() -> None:
    assert missing("| fault | now | `docs/test_faults.py::test_nothing_of_the_kind`, `docs/nowhere.py::test_x` |") == [
        "docs/test_faults.py::test_nothing_of_the_kind",
        "docs/nowhere.py::test_x",
    ]
