"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353), per input column as MambaPEFT (2411.03855) has it."""

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.checks import require_matrix, require_positive
from mambapeft_vision.methods.lora import LowRank
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import (
    frozen_weight,
    group_count,
    match_parameters,
    row_slice,
    rows_of,
    weight_port,
)


class DoRA(Method):
    """W' = m ⊙ (W + s · up · down) / ‖W + s · up · down‖, on whole weights or on one named block of output rows.

    The norm is taken of each input column (over the output dimension) and is constant for the gradient. m starts as
    ‖W‖, so W' = W at first; each weight (also the backward direction's) has its own. Several methods on one weight
    add up: each contributes W' - W of the frozen W.

    Args:
        targets: roles (in_proj, out_proj, qkv, …) or patterns of parameter names.
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

    def attach(self, model: Backbone) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            rows = row_slice(model, parameter, self.rows, self.name)
            weight = frozen_weight(model, parameter)
            require_matrix(weight, parameter, self.name)
            site = Decomposed(rows_of(weight, rows), self.rank, self.scale, group_count(model, parameter))
            self.sites[site_key(parameter)] = site
            weight_port(model, parameter).add(self.name, site.delta, rows)


class Decomposed(LowRank):
    """One weight's low-rank pair and the magnitude [1, *in] of every input column (of K matrices: [K, 1, in])."""

    def __init__(self, weight: Tensor, rank: int, scale: float, groups: int | None) -> None:
        super().__init__(weight, rank, scale, groups)
        self.magnitude = nn.Parameter(self.column_norm(weight.detach()))

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W."""
        direction = weight + super().delta(weight)
        norm = self.column_norm(direction.detach()).clamp_min(torch.finfo(direction.dtype).tiny)
        return self.magnitude / norm * direction - weight

    def column_norm(self, weight: Tensor) -> Tensor:
        """[out, *in] → [1, *in]: the norm of each input column."""
        return torch.linalg.vector_norm(weight, dim=0 if self.groups is None else 1, keepdim=True)
