"""Strict comparison of state dicts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mambapeft_vision.utils.errors import NotFiniteError, UserError
from mambapeft_vision.utils.text import plain

_BLOCK = 1 << 22  # values


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises NotFiniteError naming the tensors that hold NaN or infinity."""
    wrong = []
    for name, tensor in tensors.items():
        bad = 0 if tensor.is_meta or not _can_be_infinite(tensor) else _not_finite(tensor)
        if bad:
            wrong.append(f"{plain(name)} ({bad:,} of {tensor.numel():,})")
    if wrong:
        shown = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more tensors" if len(wrong) > 4 else "")
        raise NotFiniteError(f"{source}: NaN or infinity in {shown}; expected numbers. Get or make the file again")


def _can_be_infinite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinity; block by block, as each comparison takes memory of its own."""
    blocks = (torch.isfinite(block) for block in tensor.detach().reshape(-1).split(_BLOCK))
    return sum(0 if bool(finite.all()) else int((~finite).sum()) for finite in blocks)


def check_state(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError naming tensors of `given` that are missing, unknown or of another shape or kind."""
    problems = [f"missing: {n}" for n in expected if n not in given]
    problems += [f"unknown: {plain(n)}" for n in given if n not in expected]
    problems += [
        f"shape of {n}: {tuple(given[n].shape)}, expected {tuple(t.shape)}"
        for n, t in expected.items()
        if n in given and given[n].shape != t.shape
    ]
    both = {n: (t, given[n]) for n, t in expected.items() if n in given}
    problems += [
        f"dtype of {n}: {_name(g.dtype)}, expected {'floating point' if t.is_floating_point() else _name(t.dtype)}"
        for n, (t, g) in both.items()
        if g.dtype != t.dtype and not (g.is_floating_point() and t.is_floating_point())
    ]
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise UserError(f"{source} does not fit this model ({len(problems)} problems); nothing was loaded:\n  {shown}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
