"""Docstrings of the public API: examples run, and every parameter on the page Python API is explained."""

import doctest
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mambapeft_kernels.ss2d.api import SS2DWeights, ss2d
from mambapeft_kernels.ssm_mixer.api import Direction, ssm_mixer
from torch import nn

import mambapeft_vision as mv

PUBLIC = {name: getattr(mv, name) for name in mv.__all__ if name != "__version__"}
KERNELS = {"ss2d": ss2d, "ssm_mixer": ssm_mixer}
NAMES = {**PUBLIC, **KERNELS, "SS2DWeights": SS2DWeights, "Direction": Direction, "torch": torch, "nn": nn, "mv": mv}


@pytest.mark.parametrize("name", [*PUBLIC, *KERNELS])
def test_the_example_of_a_public_name_runs(name: str) -> None:
    text = inspect.getdoc(NAMES[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, dict(NAMES), name, None, None)
    assert example.examples, f"{name} has no example"
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert result.failed == 0, "".join(report)


API_PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md"
ENTRY = re.compile(r"^::: (\S+)(?:\n    options:\n      members: (\S.*))?$", flags=re.MULTILINE)
# An error takes a message; the fields of a result have comments, which the page Files of a run shows.
NOT_CALLED = ("mambapeft_vision.UserError", "mambapeft_vision.results.record.RunRecord")


def on_the_page() -> Iterator[tuple[str, inspect.Signature, str]]:
    """Each function, class and listed member of the page, with the text that has to explain its parameters."""
    for path, members in ENTRY.findall(API_PAGE.read_text(encoding="utf-8")):
        thing = pkgutil.resolve_name(path)
        if path not in NOT_CALLED:
            yield path, inspect.signature(thing), inspect.getdoc(thing) or ""
        for member in re.findall(r"\w+", members if members != "false" else ""):
            function = getattr(thing, member)
            yield f"{path}.{member}", inspect.signature(function), inspect.getdoc(function) or ""


def test_parameters_on_the_api_page_are_explained() -> None:
    entries = list(on_the_page())
    assert len(entries) > 25
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    missing = [
        f"{path}: {name}"
        for path, signature, text in entries
        for name, parameter in signature.parameters.items()
        if parameter.kind in named and name != "self" and not re.search(rf"\b{name}\b", text)
    ]
    assert not missing
