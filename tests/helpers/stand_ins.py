"""What tests of several files put in the place of something that is not here, or that must not be used."""

import importlib

import pytest
import torch

from mambapeft_vision.data import cache


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """PyTorch says that so many GPUs are here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on images have to come from the cache."""
    monkeypatch.setattr(cache, "decode_into", None)
    monkeypatch.setattr(cache, "decode_list", None)


def no_extension_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its BOFT would compile a CUDA extension first."""
    monkeypatch.setattr(importlib.import_module("peft.tuners.boft.layer"), "get_fbd_cuda", lambda: None)
