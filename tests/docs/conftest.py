"""Makes the site's generators importable: they lie beside the pages, outside of the package."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def generators() -> None:
    """docs/generate on the import path, where MkDocs puts it too. It stays, so that what was read is not read again."""
    sys.path.append(str(ROOT / "docs" / "generate"))
