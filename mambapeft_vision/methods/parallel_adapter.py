"""Parallel adapter (AdaptFormer, arXiv 2205.13535; on Mamba: MambaPEFT, arXiv 2411.03855)."""

import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, FunctionBranch
from mambapeft_vision.methods.checks import require_dropout, require_ported_linear, require_positive
from mambapeft_vision.methods.lora import low_rank_pair
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import match_parameters


class ParallelAdapter(Method):
    """out = W y + s · up(dropout(ReLU(down(y)))): a bottleneck beside a linear map (default: out_proj, on its input).

    `down` [r, in] starts as `nn.Linear` does, `up` [out, r] at zero; no biases.

    Args:
        targets: roles or patterns of names of linear maps with a side port.
        rank: r.
        scale: s.
        dropout: between ReLU and up.
    """

    merge_obstacle = "the ReLU between down and up is no function of a weight"

    def __init__(
        self,
        *,
        targets: str | list[str] = "out_proj",
        rank: int,
        scale: float = 0.1,
        dropout: float = 0.1,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        require_dropout(self, dropout)
        self.targets, self.rank, self.scale, self.dropout = targets, rank, scale, dropout
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            module, side = require_ported_linear(model, parameter, self.name)
            site = Bottleneck(module.weight, self.rank, self.scale, self.dropout)
            self.sites[site_key(parameter)] = site
            side.add(FunctionBranch(self.name, site))


class Bottleneck(nn.Module):
    """One site: [..., in] → s · up(dropout(ReLU(down(y)))) [..., out]."""

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.down, self.up = low_rank_pair(weight, rank)

    def forward(self, y: Tensor) -> Tensor:
        low = F.dropout(F.relu(F.linear(y, self.down)), self.dropout, self.training)
        return F.linear(low, self.scale * self.up)
