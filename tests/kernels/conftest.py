"""Where there is no GPU, Triton kernels are checked in Triton's interpreter: it must be on before Triton is imported.

So these tests want a process of their own, as `make test` gives them; within a larger run they skip.
"""

import os
import sys

import pytest
import torch

NO_GPU = not torch.cuda.is_available()
if NO_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if not NO_GPU:
        return
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="NO CUDA GPU: the GPU kernels were NOT checked in this run"))
        elif "interpreter" in item.nodeid and "tests/kernels" in item.nodeid and not interpreting:
            reason = "NOT RUN: Triton was imported before; run tests/kernels alone, as `make test` does"
            item.add_marker(pytest.mark.skip(reason=reason))
