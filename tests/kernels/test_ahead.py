"""Compilation ahead of the first step: what it launches runs; on a GPU tests/training asks whether it is all of it."""

import mambapeft_kernels.ahead as ahead
import pytest
import torch
from mambapeft_kernels import BlockSizes, compile_ahead

SIZES = BlockSizes(width=24, channels=48, states=5, rank=3, taps=4)


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_task_runs(device, dtype):
    device = torch.device("cpu" if device == "interpreter" else device)
    tasks = ahead.tasks(SIZES, 0.5, dtype, device, "triton")
    assert len(tasks) == 14
    for task in tasks:
        task()


def test_where_nothing_compiles_nothing_is_started():
    assert compile_ahead(SIZES, 0.5, torch.float32, torch.device("cpu"), "triton") == ()
    assert compile_ahead(SIZES, 0.5, torch.float32, torch.device("cuda", 0), "torch") == ()
