"""Tensors that follow from sizes alone, made once."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Result = TypeVar("Result")


def kept_tensors(function: Callable[..., Result]) -> Callable[..., Result]:
    """Caches the results, tensors among them, of a function of hashable arguments, for the last 64 arguments.

    While a program is traced (torch.export, torch.compile, fake tensors) nothing is cached, because its tensors are a
    part of the program.
    """
    # A tensor made during a test may be used in training.
    keeping = lru_cache(maxsize=64)(torch.inference_mode(False)(function))

    @wraps(function)
    def called(*arguments: object) -> Result:
        is_traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        return function(*arguments) if is_traced else keeping(*arguments)

    return called
