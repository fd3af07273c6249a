"""The layers of the project import each other in one direction only (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UTILS = "mambapeft_vision.utils"

# folder or file → what of the project it may import
ALLOWED = {
    "kernels": {"mambapeft_kernels"},
    "mambapeft_vision/methods": {"mambapeft_vision.methods", "mambapeft_vision.backbones.contract", UTILS},
    "mambapeft_vision/backbones": {"mambapeft_kernels", "mambapeft_vision.backbones", UTILS},
    "mambapeft_vision/adapter/model.py": {
        "mambapeft_vision.adapter.files",
        "mambapeft_vision.backbones.contract",
        "mambapeft_vision.methods.method",
        UTILS,
    },
    "mambapeft_vision/adapter": {
        "mambapeft_vision.adapter",
        "mambapeft_vision.backbones",
        "mambapeft_vision.methods",
        UTILS,
    },
    "mambapeft_vision/data": {"mambapeft_vision.data", UTILS},
}


def imported(path: Path) -> set[str]:
    """Names of the project's modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` counts as the module.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("mambapeft_kernels", "mambapeft_vision", "kernels")}


@pytest.mark.parametrize("place", ALLOWED)
def test_import_direction(place):
    target = ROOT / place
    files = [target] if target.is_file() else sorted(target.rglob("*.py"))
    assert files
    for file in files:
        wrong = [n for n in imported(file) if not any(n == a or n.startswith(a + ".") for a in ALLOWED[place])]
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_core_does_not_pull_in_heavy_optional_packages():
    """The kernels, backbones and methods load without what only training needs (timm itself imports wandb)."""
    code = (
        "import sys, mambapeft_kernels, mambapeft_vision.adapter.model, mambapeft_vision.backbones;"
        "print([m for m in ('matplotlib', 'hydra', 'lightning') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_what_is_imported_is_not_looked_through_for_garbage():
    program = (
        "import gc\n"
        "from mambapeft_vision.utils.startup import imports_kept\n"
        "with imports_kept():\n"
        "    assert not gc.isenabled()\n"
        "    import torch\n"
        "frozen = gc.get_freeze_count()\n"
        "assert gc.isenabled() and frozen > 10_000\n"
        "garbage = []\n"
        "with imports_kept():\n"
        "    garbage.append(garbage)\n"
        "assert gc.isenabled() and gc.get_freeze_count() == frozen\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
