"""Where there is no GPU, Triton kernels are checked in Triton's interpreter, for which tests/conftest.py imported them.

It is on while these tests run, and no other test sees it.
"""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from helpers.quick import quicken_the_interpreter

NO_GPU = not torch.cuda.is_available()
if NO_GPU and find_spec("triton") is not None:
    quicken_the_interpreter()


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if NO_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def pytest_collection_modifyitems(items):
    for item in items:
        if NO_GPU and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="NO CUDA GPU: the GPU kernels were NOT checked in this run"))
