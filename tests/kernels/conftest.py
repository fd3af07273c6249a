"""Where there is no GPU, Triton kernels are checked in Triton's interpreter: it must be on before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="NO CUDA GPU: the GPU kernels were NOT checked in this run"))
