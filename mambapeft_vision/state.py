"""Strict comparison of state dicts."""

from collections.abc import Mapping

from torch import Tensor

from mambapeft_vision.errors import UserError


def check_state(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError naming missing, unknown and mis-shaped tensors of `given`."""
    problems = [f"missing: {n}" for n in expected if n not in given]
    problems += [f"unknown: {n}" for n in given if n not in expected]
    problems += [
        f"shape of {n}: {tuple(given[n].shape)}, expected {tuple(t.shape)}"
        for n, t in expected.items()
        if n in given and given[n].shape != t.shape
    ]
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise UserError(f"{source} does not fit this model ({len(problems)} problems); nothing was loaded:\n  {shown}")
