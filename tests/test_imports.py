"""The layers of the project import each other in one direction only (docs/explanation/layout.md)."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mambapeft_vision", "mambapeft_kernels")

# Unit → the units that it may import. A unit is a folder of mambapeft_vision, unless `unit_of` says otherwise.
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "kernels": set(),
    "backbones.contract": {"kernels", "utils"},
    "backbones": {"backbones.contract", "kernels", "utils"},
    "methods": {"utils", "backbones.contract"},
    "adapter": {"backbones", "backbones.contract", "data", "methods", "utils"},
    "data": {"utils"},
    "engine": {"adapter", "backbones", "backbones.contract", "data", "kernels", "methods", "utils"},
    "results": {"adapter", "data", "utils"},
}
ALLOWED["loggers"] = {"results", "utils"}
ALLOWED["pretraining"] = {"engine", "data", "backbones", "backbones.contract", "kernels", "utils"}
ALLOWED["run"] = {*ALLOWED, "loggers"}
ALLOWED["sweep"] = {*ALLOWED, "run"}
ALLOWED["search"] = {*ALLOWED, "sweep"}
ALLOWED["integrations"] = {*ALLOWED}
ALLOWED["benchmarks"] = {*ALLOWED}
ALLOWED["package"] = {*ALLOWED} - {"benchmarks"}  # the public names in mambapeft_vision/__init__.py
ALLOWED["commands"] = {*ALLOWED}
ALLOWED["cli"] = {"commands", "package", "run", "sweep", "utils"}
ALLOWED["__main__"] = {"cli"}


# Modules of backbones/ that methods may know.
CONTRACT = {"computed", "contract", "layout", "ports"}


def unit_of(module: str) -> str:
    """The unit of a module's dotted name, or of a name inside a module."""
    parts = module.split(".")
    if parts[0] == "mambapeft_kernels":
        return "kernels"
    if parts[1:2] == ["backbones"] and len(parts) > 2 and parts[2] in CONTRACT:
        return "backbones.contract"
    if parts[1:3] == ["integrations", "wandb_logger"]:  # what a run calls; the rest stands on runs and sweeps
        return "loggers"
    is_unit = len(parts) > 1 and (parts[1] in ("cli", "__main__") or (ROOT / parts[0] / parts[1]).is_dir())
    return parts[1] if is_unit else "package"


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for folder in (ROOT / "mambapeft_vision", ROOT / "kernels" / "mambapeft_kernels"):
        for file in sorted(folder.rglob("*.py")):
            found[".".join(file.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


@cache
def imported(path: Path) -> set[str]:
    """Names of the project that a file imports, wherever in the file, but for type checkers alone."""
    found = set()
    for node in _running(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` counts as the module.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    is_checked = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for child in node.orelse if is_checked else ast.iter_child_nodes(node):
        yield from _running(child)


def test_texts_are_named_once():
    """A name for a file or an address that stands in two modules with one value is one constant, which one imports."""
    homes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(getattr(node.value, "value", None), str):
                homes[ast.unparse(node.targets[0]), ast.unparse(node.value)].append(module)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_every_unit_has_its_row():
    assert {unit_of(module) for module in modules()} <= ALLOWED.keys()


@pytest.mark.parametrize("unit", ALLOWED)
def test_import_direction(unit):
    for module, file in modules().items():
        if unit_of(module) != unit:
            continue
        wrong = [name for name in imported(file) if unit_of(name) not in {unit, *ALLOWED[unit]}]
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_no_units_import_each_other():
    """Of the imports that there are, not of those that the table allows."""
    graph: dict[str, set[str]] = {unit: set() for unit in ALLOWED}
    for module, file in modules().items():
        graph[unit_of(module)] |= {unit_of(name) for name in imported(file)} - {unit_of(module)}
    graph["package"] = set()  # imported when its names are used
    assert list(TopologicalSorter(graph).static_order())


def test_core_and_a_run_import_little_and_what_a_run_imports_is_not_looked_through_for_garbage():
    """The kernels, backbones and methods load without what only training needs, and a run without what none needs."""
    program = (
        "import gc\n"
        "from mambapeft_vision.utils.startup import imports_kept\n"
        "with imports_kept():\n"
        "    assert not gc.isenabled()\n"
        "    import sys, mambapeft_kernels, mambapeft_vision.adapter.model, mambapeft_vision.backbones\n"
        "    late = {'matplotlib', 'hydra', 'lightning', 'scipy', 'transformers'}\n"
        "    assert not late & set(sys.modules), late & set(sys.modules)\n"
        "    import mambapeft_vision.run.run\n"
        "late = {'matplotlib', 'scipy', 'torchmetrics', 'transformers', 'wandb'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)\n"
        "frozen = gc.get_freeze_count()\n"
        "assert gc.isenabled() and frozen > 10_000\n"
        "garbage = []\n"
        "with imports_kept():\n"
        "    garbage.append(garbage)\n"
        "assert gc.isenabled() and gc.get_freeze_count() == frozen\n"
        "import mambapeft_vision.sweep.preload, torch\n"  # forked workers are to use CUDA
        "assert 'mambapeft_vision.sweep.worker' in sys.modules and not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
