"""LoRA and partial LoRA (LoRA, arXiv 2106.09685; LoRA_p, MambaPEFT, arXiv 2411.03855)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.methods.method import (
    Method,
    add_weight_delta,
    frozen_weight,
    match_parameters,
    owner_module,
    require_dropout,
    require_matrix,
    require_positive,
    row_slice,
    site_key,
)
from mambapeft_vision.utils.errors import UserError


class LoRA(Method):
    """y = W x + s · up(dropout(down(x))), on whole weights or on one named block of output rows.

    `down` [r, in] starts Kaiming-uniform as `nn.Linear` does, `up` [out, r] at zero. For a convolution (the patch
    embedding) `down` is a convolution with the same kernel and stride, and `up` is 1x1.

    Args:
        targets: patterns of parameter names, e.g. "layers.*.mixer.in_proj.weight".
        rank: r.
        scale: the bare factor s (not alpha / r).
        dropout: between down and up; in activation space only.
        rows: a block of output rows that the backbone names: x, z of in_proj; d, b, c of x_proj.
        space: "activation" runs the branch on activations (allows dropout); "weight" adds s·up·down to the
            weight where it is read. Equal at dropout 0.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        rank: int,
        scale: float = 0.1,
        dropout: float = 0.0,
        rows: str | None = None,
        space: str = "activation",
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        require_dropout(self, dropout)
        if space not in ("activation", "weight"):
            raise UserError(f"LoRA: space={space!r}; expected 'activation' or 'weight'")
        if space == "weight" and dropout:
            raise UserError(f"LoRA: dropout={dropout} needs space: activation; in weight space set dropout: 0")
        self.targets, self.rank, self.scale, self.dropout = targets, rank, scale, dropout
        self.rows, self.space = rows, space
        self.sites = nn.ModuleDict()
        self._places: dict[str, slice | None] = {}  # parameter → rows

    def attach(self, model: nn.Module) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            module, attribute = owner_module(model, parameter)
            rows = row_slice(model, parameter, self.rows, self.name)
            weight = frozen_weight(model, parameter)
            require_matrix(weight, parameter, self.name)
            site = LowRank(weight if rows is None else weight[rows], module, self.rank, self.scale, self.dropout)
            self.sites[site_key(parameter)] = site
            self._places[parameter] = rows
            if self.space == "weight":
                add_weight_delta(model, parameter, self.name, site.delta, rows)
                continue
            if attribute != "weight" or not hasattr(module, "side"):
                raise UserError(
                    f"{self.name}: {parameter} has no port on activations; set space: weight and dropout: 0"
                )
            module.side.add(self.name, site, rows)

    def to_weight_space(self, model: nn.Module) -> None:
        if self.space == "weight":
            return
        for parameter, rows in self._places.items():
            module, _ = owner_module(model, parameter)
            module.side.remove(self.name)
            add_weight_delta(model, parameter, self.name, self.sites[site_key(parameter)].delta, rows)


class LowRank(nn.Module):
    """One site's pair of matrices. Called with activations it is the branch; `delta` is the same map as a weight."""

    def __init__(self, weight: Tensor, module: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.down, self.up = low_rank_pair(weight, rank)
        convolution = isinstance(module, nn.Conv2d)
        self.stride = module.stride if convolution else None
        self.padding = module.padding if convolution else None

    @property
    def low_rank(self) -> tuple[Tensor, Tensor, float, float] | None:
        """down, up, scale, dropout: what a linear map's port joins to the map itself; None beside a convolution."""
        return (self.down, self.up, self.scale, self.dropout * self.training) if self.stride is None else None

    def forward(self, x: Tensor) -> Tensor:
        if self.stride is None:
            low = F.dropout(F.linear(x, self.down), self.dropout, self.training)
            return F.linear(low, self.scale * self.up)
        low = F.conv2d(x, self.down, stride=self.stride, padding=self.padding)
        return F.conv2d(F.dropout(low, self.dropout, self.training), self.scale * self.up)

    def delta(self, weight: Tensor) -> Tensor:
        """s · up · down, in `weight`'s shape."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * product.view_as(weight)


def low_rank_pair(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """down [r, *in] as `nn.Linear` initialises it and up [out, r] at zero, for a weight [out, *in]."""
    out_features, *in_shape = weight.shape
    down = nn.Parameter(weight.new_empty(rank, *in_shape))
    up = nn.Parameter(weight.new_zeros(out_features, rank, *([1] * (len(in_shape) - 1))))
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return down, up
