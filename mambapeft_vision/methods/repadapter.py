"""RepAdapter: adapters in front of linear maps, which become a part of them after training (arXiv 2302.08106)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, FunctionBranch
from mambapeft_vision.methods.checks import (
    require_dropout,
    require_ported_linear,
    require_positive,
    side_port,
    undecayed_biases,
)
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import frozen_weight, match_or_default, weight_port
from mambapeft_vision.utils.errors import UserError

#: The first linear map of every branch.
ROLES = ("in_proj", "qkv", "mlp_up")


class RepAdapter(Method):
    """out = W (x + s · up(dropout(down(x)))), down: in → r, up: r → in in groups.

    Output features and channels of the bottleneck are in `groups` parts, and up connects equal parts only. It is
    computed beside the map, as s · (W up) down x, so that nothing of x's width is added. Without dropout it equals
    W' = W (I + s up down), b' = b + s W (up b_down + b_up). With biases it merges into maps that have one.

    down starts as Xavier, up and biases at zero. Biases have no weight decay.

    Args:
        targets: roles or patterns of names of linear maps with a side port; None: all of `ROLES` that the backbone has.
        dim: r.
        scale: s; published: chosen for each task, from 0.1 to 10.
        groups: number of groups of `up`.
        bias: whether down and up have biases, as published.
        dropout: between down and up.
    """

    def __init__(
        self,
        *,
        targets: str | list[str] | None = None,
        dim: int = 8,
        scale: float = 1.0,
        groups: int = 2,
        bias: bool = True,
        dropout: float = 0.1,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, dim=dim, groups=groups)
        require_dropout(self, dropout)
        if dim % groups:
            raise UserError(f"RepAdapter: dim={dim} does not divide into groups={groups}; change one of them")
        self.targets, self.dim, self.scale, self.groups = targets, dim, scale, groups
        self.bias, self.dropout = bias, dropout
        self.sites: Any = nn.ModuleDict()
        self._maps: dict[str, nn.Linear] = {}

    def attach(self, model: Backbone) -> None:
        for parameter in match_or_default(model, self.targets, ROLES, self.name):
            module, side = require_ported_linear(model, parameter, self.name)
            if module.in_features % self.groups:
                raise UserError(
                    f"{self.name}: the {module.in_features} inputs of {parameter} do not divide into "
                    f"groups={self.groups}; change groups or targets"
                )
            site = InputAdapter(self, module.weight)
            self.sites[site_key(parameter)], self._maps[site_key(parameter)] = site, module
            side.add(FunctionBranch(self.name, partial(site.beside, module)))
            if self.bias and module.bias is None:
                self.merge_obstacle = (
                    "its biases are a bias of its maps, which some of them do not have; set bias: false"
                )

    def to_weight_space(self, model: Backbone) -> None:
        for key, site in self.sites.items():
            parameter = key.replace("/", ".")
            side = side_port(model, parameter)
            assert side is not None
            side.remove(self.name)
            weight_port(model, parameter).add(self.name, site.weight_delta)
            if self.bias:
                bias = parameter.removesuffix("weight") + "bias"
                weight_port(model, bias).add(self.name, partial(site.bias_delta, frozen_weight(model, parameter)))

    def fold(self) -> None:
        for key, site in self.sites.items():
            site.keep_product(self._maps[key].weight)

    def param_groups(self) -> list[dict[str, Any]]:
        return undecayed_biases(self)


class InputAdapter(nn.Module):
    """The adapter of one weight [out, in]."""

    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    product: Tensor | None  # s W up and s W b_up, once W is about to change
    offset: Tensor | None

    def __init__(self, method: RepAdapter, weight: Tensor) -> None:
        super().__init__()
        self.scale, self.groups, self.dropout = method.scale, method.groups, method.dropout
        rank, features = method.dim, weight.shape[1]
        self.down = nn.Parameter(nn.init.xavier_uniform_(weight.new_empty(rank, features)))
        self.up = nn.Parameter(weight.new_zeros(features, rank // self.groups))
        for name, size in (("down_bias", rank), ("up_bias", features)):
            self.register_parameter(name, nn.Parameter(weight.new_zeros(size)) if method.bias else None)
        for name in ("product", "offset"):
            self.register_buffer(name, None, persistent=False)

    @property
    def dense_up(self) -> Tensor:
        """up as one matrix [in, r]."""
        return torch.block_diag(*self.up.chunk(self.groups))

    def beside(self, module: nn.Linear, x: Tensor) -> Tensor:
        """The addition to the map's output, W s · up(dropout(down(x)))."""
        low = F.dropout(F.linear(x, self.down, self.down_bias), self.dropout, self.training)
        if self.product is not None:
            return F.linear(low, self.product, self.offset)
        return F.linear(low, *self._through(module.weight))

    def _through(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """up and its bias, behind W and scaled."""
        bias = None if self.up_bias is None else self.scale * (weight @ self.up_bias)
        return self.scale * (weight @ self.dense_up), bias

    def keep_product(self, weight: Tensor) -> None:
        """Keeps the product with this W, so that later changes of the map's weight do not matter."""
        self.product, self.offset = self._through(weight.detach())

    def weight_delta(self, weight: Tensor) -> Tensor:
        """s W up down."""
        return self.scale * (weight @ self.dense_up) @ self.down

    def bias_delta(self, weight: Tensor, bias: Tensor) -> Tensor:
        """s W (up b_down + b_up)."""
        assert self.down_bias is not None and self.up_bias is not None
        return self.scale * (weight @ (self.dense_up @ self.down_bias + self.up_bias))
