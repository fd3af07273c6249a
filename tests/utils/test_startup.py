"""Tests of utils/startup.py."""

import ctypes
import sys
import threading
from importlib.metadata import version

import pytest
import torchmetrics
from torch import nn

from mambapeft_vision.utils import startup


def test_lightning_gets_two_names_and_anybody_else_the_package(monkeypatch):
    few = startup.FewMetrics("torchmetrics")
    monkeypatch.setitem(sys.modules, "torchmetrics", few)
    assert few.__version__ == version("torchmetrics")
    assert issubclass(few.Metric, nn.Module) and few.Metric is few.Metric is not torchmetrics.Metric
    with pytest.raises(AttributeError):
        few.__path__  # noqa: B018
    monkeypatch.setitem(sys.modules, "torchmetrics", torchmetrics)
    assert few.Accuracy is torchmetrics.Accuracy


@pytest.mark.parametrize(
    ("device", "context"), [("auto", 0), ("cuda", 0), ("cuda:3", 3), ("cpu", None), ("mps", None), ("cuda:x", None)]
)
def test_cuda_begins_on_the_gpu_that_a_run_will_use(monkeypatch, device, context):
    made = []

    class Driver:
        cuInit = staticmethod(lambda flags: 0)  # noqa: N815 (the driver's name)

        @staticmethod
        def cuDevicePrimaryCtxRetain(pointer, number):  # noqa: N802
            made.append(number)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver)
    startup.begin_cuda(device)
    for thread in threading.enumerate():
        if thread.name == startup.THREAD:
            thread.join()
    assert made == ([] if context is None else [context])


def test_without_a_driver_nothing_happens(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    startup.retain_context(0)
