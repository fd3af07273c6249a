"""Which implementation runs: resolved once from what was asked for and what this machine has."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch

# Name → module of the mixer core, best first for the devices it supports.
BACKENDS: dict[str, str] = {
    "torch": "vectorised PyTorch with recomputation; any device",
    "naive": "the definition, plain autograd; any device, slow, for checks",
}


def available_backends(device: torch.device | str) -> list[str]:
    """The backends that can run on `device`, best first."""
    return list(BACKENDS)


def resolve_backend(name: str, device: torch.device | str) -> str:
    """`name` itself if it can run on `device`; for "auto" the best that can.

    Raises: ValueError naming what was asked, what can run, and the remedy.
    """
    choices = available_backends(device)
    if name == "auto":
        return choices[0]
    if name not in BACKENDS:
        raise ValueError(f"kernel={name!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if name not in choices:
        raise ValueError(f"kernel={name} cannot run on {device}; here: auto, {', '.join(choices)}")
    return name


@cache
def load_backend(op: str, backend: str) -> Callable:
    """The function of `op` ("mixer") for a resolved backend; imported on first use."""
    module = importlib.import_module(f"mambapeft_kernels.{op}.{backend}")
    return module.ssm_mixer


def describe(name: str, device: torch.device | str) -> str:
    """One line for the log: what was asked for and what runs."""
    resolved = resolve_backend(name, device)
    asked = "" if name == resolved else f" (kernel={name})"
    return f"kernel {resolved}{asked} on {device}: {BACKENDS[resolved]}"
