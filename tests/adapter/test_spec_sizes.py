"""Whole numbers in methods' specs: each has a largest value, before any tensor is made."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import pytest

from mambapeft_vision import methods
from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.methods.method import Method
from mambapeft_vision.utils.errors import UserError


def _whole_numbers() -> Iterator[tuple[str, str]]:
    """Every method's class, and each of its arguments that takes a whole number."""
    for file in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"{methods.__name__}.{file.name}")
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if not issubclass(cls, Method) or inspect.isabstract(cls) or cls.__module__ != module.__name__:
                continue
            for key, parameter in inspect.signature(cls, eval_str=True).parameters.items():
                if parameter.annotation in (int, int | None):
                    yield f"{module.__name__}.{name}", key


@pytest.mark.parametrize(("target", "key"), sorted(_whole_numbers()))
def test_a_whole_number_of_a_spec_has_a_largest_value(target: str, key: str) -> None:
    cls = getattr(importlib.import_module(target.rpartition(".")[0]), target.rpartition(".")[2])
    needed = {
        name: {int: 1, float: 1.0, bool: True}.get(p.annotation, "in_proj")
        for name, p in inspect.signature(cls, eval_str=True).parameters.items()
        if p.default is inspect.Parameter.empty and p.kind is not inspect.Parameter.VAR_KEYWORD
    }
    with pytest.raises(UserError, match=re.escape(f"sent.m.{key}=")):
        build_method("m", {"_target_": target, **needed, key: 2**31}, "sent")
