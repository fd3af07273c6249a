"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353).

Magnitudes are of input columns, as MambaPEFT (arXiv 2411.03855) has them, or of output rows, as the authors' code and
Hugging Face peft have them.
"""

from typing import Any

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
from mambapeft_vision.utils.errors import UserError

COLUMNS, ROWS = "columns", "rows"


class DoRA(Method):
    """W' = m ⊙ (W + s · up · down) / ‖W + s · up · down‖, on whole weights or on one named block of output rows.

    The norm is taken of each input column (over the output dimension) or of each output row, and is constant for the
    gradient. m starts as ‖W‖, so W' = W at first; each weight (also the backward direction's) has its own. Several
    methods on one weight add up: each contributes W' - W of the frozen W.

    Args:
        targets: roles (in_proj, out_proj, qkv, …) or patterns of parameter names.
        rank: r.
        scale: the bare factor s (not alpha / r).
        rows: a block of output rows that the backbone names: x, z of in_proj; d, b, c of x_proj.
        magnitudes: "columns", one for each input column, or "rows", one for each output row.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        rank: int,
        scale: float = 0.1,
        rows: str | None = None,
        magnitudes: str = COLUMNS,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        if magnitudes not in (COLUMNS, ROWS):
            raise UserError(f"DoRA: magnitudes={magnitudes!r}; expected {COLUMNS!r} or {ROWS!r}")
        self.targets, self.rank, self.scale, self.rows, self.magnitudes = targets, rank, scale, rows, magnitudes
        self.sites: Any = nn.ModuleDict()
        self._places: dict[str, slice | None] = {}  # parameter → rows

    def attach(self, model: Backbone) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            rows = row_slice(model, parameter, self.rows, self.name)
            weight = frozen_weight(model, parameter)
            require_matrix(weight, parameter, self.name)
            of_rows = self.magnitudes == ROWS
            site = Decomposed(rows_of(weight, rows), self.rank, self.scale, group_count(model, parameter), of_rows)
            self.sites[site_key(parameter)] = site
            self._places[parameter] = rows
            weight_port(model, parameter).add(self.name, site.delta, rows)

    def pairs(self) -> dict[str, tuple["Decomposed", slice | None]]:
        """The factors and magnitudes of every target, and the rows that they are for."""
        return {parameter: (self.sites[site_key(parameter)], rows) for parameter, rows in self._places.items()}


class Decomposed(LowRank):
    """One weight's low-rank pair, and its magnitudes.

    They are [1, *in], of the input columns, or with `of_rows` [out, 1, …]. Of K matrices: [K, 1, in], [K, out, 1].
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, groups: int | None, of_rows: bool) -> None:
        super().__init__(weight, rank, scale, groups)
        self.of_rows = of_rows
        self.magnitude = nn.Parameter(self.norm(weight.detach()))

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W."""
        direction = weight + super().delta(weight)
        norm = self.norm(direction.detach()).clamp_min(torch.finfo(direction.dtype).tiny)
        return self.magnitude / norm * direction - weight

    def norm(self, weight: Tensor) -> Tensor:
        """The norm of each input column or output row, in the magnitudes' shape."""
        out = 0 if self.groups is None else 1
        axes = tuple(range(out + 1, weight.ndim)) if self.of_rows else out
        return torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
