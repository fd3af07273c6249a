"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353), per input column as MambaPEFT (2411.03855) has it."""

import torch
from torch import Tensor, nn

from mambapeft_vision.methods.lora import LowRank
from mambapeft_vision.methods.method import (
    Method,
    add_weight_delta,
    frozen_weight,
    match_parameters,
    owner_module,
    require_matrix,
    require_positive,
    row_slice,
    site_key,
)


class DoRA(Method):
    """W' = m ⊙ (W + s · up · down) / ‖W + s · up · down‖, on whole weights or on one named block of output rows.

    The norm is taken of each input column (over the output dimension) and is constant for the gradient. m starts as
    ‖W‖, so W' = W at first; each weight (also the backward direction's) has its own. Several methods on one weight
    add up: each contributes W' - W of the frozen W.

    Args:
        targets: patterns of parameter names, e.g. "layers.*.mixer.in_proj.weight".
        rank: r.
        scale: the bare factor s (not alpha / r).
        rows: a block of output rows that the backbone names: x, z of in_proj; d, b, c of x_proj.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        rank: int,
        scale: float = 0.1,
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        self.targets, self.rank, self.scale, self.rows = targets, rank, scale, rows
        self.sites = nn.ModuleDict()

    def attach(self, model: nn.Module) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            module, _ = owner_module(model, parameter)
            rows = row_slice(model, parameter, self.rows, self.name)
            weight = frozen_weight(model, parameter)
            require_matrix(weight, parameter, self.name)
            site = Decomposed(weight if rows is None else weight[rows], module, self.rank, self.scale)
            self.sites[site_key(parameter)] = site
            add_weight_delta(model, parameter, self.name, site.delta, rows)


class Decomposed(LowRank):
    """One site: the low-rank pair and the magnitude [1, *in] of every input column."""

    def __init__(self, weight: Tensor, module: nn.Module, rank: int, scale: float) -> None:
        super().__init__(weight, module, rank, scale, dropout=0.0)
        self.magnitude = nn.Parameter(column_norm(weight.detach()))

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W."""
        direction = weight + super().delta(weight)
        norm = column_norm(direction.detach()).clamp_min(torch.finfo(direction.dtype).tiny)
        return self.magnitude / norm * direction - weight


def column_norm(weight: Tensor) -> Tensor:
    """[out, *in] → [1, *in]: the norm of each input column."""
    return torch.linalg.vector_norm(weight, dim=0, keepdim=True)
