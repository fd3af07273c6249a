"""The choice of a device from its name."""

import pytest
import torch
from helpers.stand_ins import with_gpus

from mambapeft_vision.engine.device import resolve_device
from mambapeft_vision.utils.errors import UserError


def test_cuda_and_auto_are_one_device(monkeypatch):
    with_gpus(monkeypatch, 2)
    assert resolve_device("auto") == resolve_device("cuda") == resolve_device("cuda:0") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1) and resolve_device("cpu") == torch.device("cpu")


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    with_gpus(monkeypatch, 0)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "PyTorch sees 0 GPUs"), ("cuda:3", "PyTorch sees 0 GPUs"), ("tpu", "expected auto, cpu, cuda or cuda:N")],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, message):
    with_gpus(monkeypatch, 0)
    with pytest.raises(UserError, match=message):
        resolve_device(name)
