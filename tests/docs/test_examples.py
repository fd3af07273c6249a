"""Public functions and classes have an example in their docstring, and it runs."""

import doctest
import inspect

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
