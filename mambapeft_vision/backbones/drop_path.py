"""Drop path (stochastic depth, arXiv 1603.09382): in training, the branch of a sample is left out at random."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Branch [B, ...] with whole samples set to zero with probability `rate`, the others divided by 1 - rate."""
    if not (training and rate):
        return branch
    keep, ones = 1.0 - rate, (1,) * (branch.dim() - 1)
    return branch * (torch.rand(branch.shape[0], *ones, device=branch.device) < keep).to(branch.dtype) / keep


class BranchScales(nn.Module):
    """The factors of several branches, drawn at once for kernels that add a scaled branch.

    Args:
        rates: probability with which each branch is left out.
    """

    keep: Tensor  # [branches], on the model's device, where a captured step draws

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates = tuple(rates)
        self.register_buffer("keep", torch.empty(len(self.rates)), persistent=False)
        self.fill()

    def forward(self, batch: int) -> Tensor | None:
        """[branches, batch] factors, 0 or 1 / (1 - rate), drawn per sample; None outside training."""
        if not (self.training and max(self.rates, default=0.0) > 0):
            return None
        keep = self.keep[:, None]
        return (torch.rand(keep.shape[0], batch, device=keep.device) < keep).to(keep.dtype) / keep

    def fill(self) -> None:
        with torch.no_grad():
            self.keep.copy_(1.0 - torch.tensor(self.rates))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "BranchScales":
        """Moves, casts or empties all tensors; `keep` gets its values again, since no state dict holds them."""
        super()._apply(fn, recurse)
        self.fill()
        return self
