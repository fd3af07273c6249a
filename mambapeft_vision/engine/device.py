"""The one choice of a device from its name in a config."""

import re

import torch

from mambapeft_vision.utils.errors import UserError


def resolve_device(name: str) -> torch.device:
    """`auto` → the first GPU, or the CPU; `cuda` → the first GPU; else the device itself.

    Args:
        name: auto, cpu, cuda or cuda:N.

    Raises: UserError when the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"device={name!r}; expected auto, cpu, cuda or cuda:N")
    index = int(match[1] or 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"device={name}: PyTorch sees {torch.cuda.device_count()} GPUs; choose auto or cpu")
    return torch.device("cuda", index)
