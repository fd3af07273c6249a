"""Makes the site's generators importable: they lie beside the pages, outside of the package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """docs/generate on the import path, as MkDocs has it while it loads the hooks."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "docs")):
            del sys.modules[name]
