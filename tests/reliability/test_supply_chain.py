"""The files that pin dependencies fit pyproject.toml."""

import importlib.util
import re
import subprocess

import pytest
from helpers import runs

spec = importlib.util.spec_from_file_location("constraints", runs.ROOT / "scripts" / "constraints.py")
constraints = importlib.util.module_from_spec(spec)
spec.loader.exec_module(constraints)


def test_the_constraints_pin_every_dependency_exactly_and_inside_its_range():
    lines = [line for line in (runs.ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^\s=;@]+", line) for line in lines)
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines)
    for requirement in constraints.direct():
        version = pinned[constraints.canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_what_dependencies_need_is_pinned_too():
    pinned = constraints.installed(constraints.direct())
    assert pinned.keys() > {constraints.canonicalize_name(r.name) for r in constraints.direct()}
    assert {
        "antlr4-python3-runtime",
        "scipy",
        "pluggy",
        "sympy",
    } <= pinned.keys()  # of hydra, scikit-learn, pytest, torch


def index(text):
    return lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=text, stderr="nothing found")


def test_lowest_is_the_lowest_inside_the_range(monkeypatch):
    listed = "name (2.0)\nAvailable versions: 2.0, 1.10.1+cpu, 1.10, 1.9.1, 1.9, 1.8\n"
    monkeypatch.setattr(constraints.subprocess, "run", index(listed))
    for text, expected in (("name>=1.9", "1.9"), ("name>=1.9.1,<2", "1.9.1"), ("name>=1.10.1", "2.0"), ("name", "1.8")):
        assert str(constraints.lowest(constraints.Requirement(text))) == expected
    with pytest.raises(SystemExit, match=r"the index has no name>=3 for this Python; the lowest it has is 1\.8"):
        constraints.lowest(constraints.Requirement("name>=3"))
    monkeypatch.setattr(constraints.subprocess, "run", index(""))
    with pytest.raises(SystemExit, match="no wheel of name"):
        constraints.lowest(constraints.Requirement("name>=3"))
