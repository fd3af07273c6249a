"""Tensors that are computed anew before each use, in the place of a parameter: pruned, normalised, parametrized."""

from collections.abc import Iterator
from typing import cast

from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def computed_tensors(model: nn.Module) -> Iterator[str]:
    """Names of the tensors in a model that PyTorch's tools compute from others."""
    for path, module in model.named_modules():
        for name in _own(module):
            yield f"{path}.{name}" if path else name


def make_permanent(module: nn.Module, name: str) -> None:
    """Puts a parameter of the present value where a module computes its tensor `name`; others stay as they are."""
    if parametrize.is_parametrized(module, name):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for hook in list(module._forward_pre_hooks.values()):
        if _tensor_of(hook) != name:
            continue
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, name)
        else:
            prune.remove(module, name)


def _own(module: nn.Module) -> Iterator[str]:
    if parametrize.is_parametrized(module):
        yield from cast(nn.ModuleDict, module.parametrizations)
    for hook in module._forward_pre_hooks.values():
        name = _tensor_of(hook)
        if name is not None:
            yield name


def _tensor_of(hook: object) -> str | None:
    """The tensor that a hook before `forward` computes; None for other hooks."""
    if isinstance(hook, prune.BasePruningMethod):
        return str(hook._tensor_name)
    return hook.name if isinstance(hook, (WeightNorm, SpectralNorm)) else None
