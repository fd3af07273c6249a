"""LoRA and partial LoRA (LoRA, arXiv 2106.09685; LoRA_p, MambaPEFT, arXiv 2411.03855).

Its options are rsLoRA (arXiv 2312.03732), LoRA+ (arXiv 2402.12354) and PiSSA (arXiv 2404.02948).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, FunctionBranch, LowRankBranch, SidePort
from mambapeft_vision.methods.checks import require_dropout, require_matrix, require_positive, side_port
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import (
    frozen_weight,
    group_count,
    match_parameters,
    owner_module,
    row_slice,
    rows_of,
    weight_port,
)
from mambapeft_vision.utils.errors import UserError


class LoRA(Method):
    """y = W x + s · up(dropout(down(x))), on whole weights or on one named block of output rows.

    `down` [r, in] starts Kaiming-uniform as `nn.Linear` does, `up` [out, r] at zero. For a convolution (the patch
    embedding) `down` is a convolution with the same kernel and stride, and `up` is 1x1. Of a grouped weight
    [K, rows, columns] every matrix has its own pair: `down` [K, r, columns], `up` [K, rows, r], in weight space.

    Args:
        targets: roles (in_proj, out_proj, qkv, …) or patterns of parameter names.
        rank: r.
        scale: the bare factor s (not alpha / r).
        dropout: between down and up; in activation space only.
        rows: a block of output rows that the backbone names: x, z of in_proj; d, b, c of x_proj.
        space: "activation" runs the branch on activations (allows dropout); "weight" adds s·up·down to the
            weight where it is read. Equal at dropout 0.
        init: "zero", or "pissa": up · down starts as the r largest singular values and vectors of W over s, and their
            first product is taken from W, so that the model starts as the base model. Both first factors are saved, as
            singular vectors of one matrix differ between machines.
        rank_stabilised: s = scale / √r instead of scale (rsLoRA).
        up_lr_mult: further factor on the learning rate of `up` (LoRA+, whose authors take 16).
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
        init: str = "zero",
        rank_stabilised: bool = False,
        up_lr_mult: float = 1.0,
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
        if init not in ("zero", "pissa"):
            raise UserError(f"LoRA: init={init!r}; expected 'zero' or 'pissa'")
        if init == "pissa" and not scale > 0:
            raise UserError(f"LoRA: init: pissa divides by the scale, got scale={scale!r}; expected a number > 0")
        if not up_lr_mult >= 0:
            raise UserError(f"LoRA: up_lr_mult={up_lr_mult!r}; expected a number >= 0")
        self.targets, self.rank, self.scale, self.dropout = targets, rank, scale, dropout
        self.rows, self.space = rows, space
        self.init, self.rank_stabilised, self.up_lr_mult = init, rank_stabilised, up_lr_mult
        self._factor = scale / math.sqrt(rank) if rank_stabilised else scale  # s
        self.sites: Any = nn.ModuleDict()
        self._places: dict[str, slice | None] = {}  # parameter → rows

    def attach(self, model: Backbone) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            rows = row_slice(model, parameter, self.rows, self.name)
            weight = frozen_weight(model, parameter)
            require_matrix(weight, parameter, self.name)
            part, groups = rows_of(weight, rows), group_count(model, parameter)
            module, _ = owner_module(model, parameter)
            if isinstance(module, nn.Conv2d):
                pair: LowRank = LowRankConvolution(part, self.rank, self._factor, self.dropout, module)
            else:
                pair = LowRank(part, self.rank, self._factor, groups)
            if self.init == "pissa":
                self._require_rank_of(pair, part, parameter)
                pair.start_principal(part.detach())
                weight_port(model, parameter).add(self.name, pair.less_first, rows)
            self.sites[site_key(parameter)] = pair
            self._places[parameter] = rows
            if self.space == "weight":
                weight_port(model, parameter).add(self.name, pair.delta, rows)
            else:
                self._side(model, parameter).add(self._branch(pair, rows))

    def _require_rank_of(self, pair: "LowRank", weight: Tensor, parameter: str) -> None:
        largest = min(pair.matrix(weight).shape[-2:])
        if self.rank > largest:
            raise UserError(
                f"{self.name}: rank={self.rank}, but {parameter} has {largest} singular values; expected at most these "
                f"with init: pissa"
            )

    def param_groups(self) -> list[dict[str, Any]]:
        if self.up_lr_mult == 1:
            return super().param_groups()
        pairs = self.sites.values()
        return [
            {"params": [pair.down for pair in pairs], "lr_mult": self.lr_mult, "decay_mult": self.decay_mult},
            {
                "params": [pair.up for pair in pairs],
                "lr_mult": self.lr_mult * self.up_lr_mult,
                "decay_mult": self.decay_mult,
            },
        ]

    def pairs(self) -> dict[str, tuple["LowRank", slice | None]]:
        """The factors of every target, and the rows that they are for."""
        return {parameter: (self.sites[site_key(parameter)], rows) for parameter, rows in self._places.items()}

    def _branch(self, pair: "LowRank", rows: slice | None) -> LowRankBranch | FunctionBranch:
        if isinstance(pair, LowRankConvolution):
            return FunctionBranch(self.name, pair, rows)
        return LowRankBranch(self.name, pair, self._factor, self.dropout, rows=rows)

    def _side(self, model: Backbone, parameter: str) -> SidePort:
        side = side_port(model, parameter)
        if side is None:
            raise UserError(f"{self.name}: {parameter} has no port on activations; set space: weight and dropout: 0")
        return side

    def to_weight_space(self, model: Backbone) -> None:
        if self.space == "weight":
            return
        for parameter, rows in self._places.items():
            self._side(model, parameter).remove(self.name)
            pair = self.sites[site_key(parameter)]
            weight_port(model, parameter).add(self.name, pair.delta, rows)


class LowRank(nn.Module):
    """The pair of factors of one weight [out, *in], or with `groups` K of K matrices [K, out, in]."""

    first_down: Tensor
    first_up: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, groups: int | None = None) -> None:
        super().__init__()
        self.scale, self.groups = scale, groups
        self.down, self.up = low_rank_pair(weight, rank, groups)

    def delta(self, weight: Tensor) -> Tensor:
        """s · up · down, in `weight`'s shape."""
        return self.scale * (self.matrix(self.up) @ self.matrix(self.down)).view_as(weight)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight or factor as matrices [..., out, in]."""
        return weight.flatten(1 if self.groups is None else 2)

    def start_principal(self, weight: Tensor) -> None:
        """Sets s · up · down to the largest singular values and vectors of `weight`, and keeps these first factors."""
        rank = self.matrix(self.down).shape[-2]
        left, values, right = torch.linalg.svd(self.matrix(weight), full_matrices=False)
        roots = (values[..., :rank] / self.scale).sqrt()
        with torch.no_grad():
            self.down.copy_((roots[..., :, None] * right[..., :rank, :]).reshape(self.down.shape))
            self.up.copy_((left[..., :rank] * roots[..., None, :]).reshape(self.up.shape))
        self.register_buffer("first_down", self.down.detach().clone())
        self.register_buffer("first_up", self.up.detach().clone())

    def less_first(self, weight: Tensor) -> Tensor:
        """-s · up · down of the first factors, in `weight`'s shape."""
        return -self.scale * (self.matrix(self.first_up) @ self.matrix(self.first_down)).view_as(weight)


class LowRankConvolution(LowRank):
    """The pair beside a convolution: `down` is a convolution like it, `up` is 1x1."""

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float, beside: nn.Conv2d) -> None:
        super().__init__(weight, rank, scale)
        self.dropout = dropout
        self.geometry: dict[str, Any] = {"stride": beside.stride, "padding": beside.padding}

    def forward(self, x: Tensor) -> Tensor:
        """s · up(dropout(down(x))), [B, C, H, W] → [B, out, rows, columns]."""
        low = F.conv2d(x, self.down, **self.geometry)
        return F.conv2d(F.dropout(low, self.dropout, self.training), self.scale * self.up)


def low_rank_pair(weight: Tensor, rank: int, groups: int | None = None) -> tuple[nn.Parameter, nn.Parameter]:
    """down [r, *in] as `nn.Linear` initialises it and up [out, r] at zero, for a weight [out, *in].

    With `groups` K the weight is [K, out, in], and the pair is [K, r, in], [K, out, r]: K pairs of this kind.
    """
    if groups is not None:
        _, out_features, in_features = weight.shape
        down = nn.Parameter(weight.new_empty(groups, rank, in_features))
        for matrix in down.detach():
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        return down, nn.Parameter(weight.new_zeros(groups, out_features, rank))
    out_features, *in_shape = weight.shape
    down = nn.Parameter(weight.new_empty(rank, *in_shape))
    up = nn.Parameter(weight.new_zeros(out_features, rank, *([1] * (len(in_shape) - 1))))
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return down, up
