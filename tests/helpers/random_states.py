"""Models with random values, compared with their recomputation from formulas."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

State = dict[str, torch.Tensor]


def values(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {n: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    for name in state:
        if name.endswith(".m") or "norm" in name:
            state[name] = state[name].abs() + 0.5
    return state


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / (scale if scale > 1e-14 else 1.0)


def gradients(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    state: State,
    images: torch.Tensor,
    dense: Callable[[State, torch.Tensor], torch.Tensor],
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The gradient of each trained tensor, of the model and of `dense`; asserts equal logits."""
    labels = torch.tensor([0, 3])
    ours = model(images)
    F.cross_entropy(ours, labels).backward()
    theirs_state = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in state.items()}
    theirs = dense(theirs_state, images)
    F.cross_entropy(theirs, labels).backward()
    assert error(ours, theirs) < 1e-10
    return {name: (parameter.grad, theirs_state[name].grad) for name, parameter in trained.items()}
