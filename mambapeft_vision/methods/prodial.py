"""ProDiaL: projector-targeted diagonal-centric linear transformation (arXiv 2411.15224)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.methods.lora import low_rank_pair
from mambapeft_vision.methods.method import (
    Method,
    add_weight_delta,
    match_parameters,
    owner_module,
    require_dropout,
    require_ported_linear,
    require_positive,
    site_key,
)
from mambapeft_vision.utils.errors import UserError

# Blocks up to this size are multiplied out number by number: batched products of 2x2 matrices are slow on a GPU.
SMALL_BLOCK = 4


class ProDiaL(Method):
    """W' = diag(s) W D_b + (α/r) up · down, on the projectors (in_proj, out_proj or both).

    D_b is block-diagonal on the input side. It comes from raw blocks a (zero at first): off-diagonal entries a,
    diagonal entries 1 + a ("free") or 1 - relu(a) ("relu", as released). relu has no gradient at its zero start, so
    the released form never moves the diagonal. s starts at one and has no weight decay (which would pull the weights
    to zero). The low-rank branch runs on activations, with dropout on its input.

    Args:
        targets: patterns of parameter names of linear maps with a side port.
        n_blocks: blocks of D_b; each has ceil(in / n_blocks) inputs, the last one what is left.
        rank: r.
        alpha: α.
        dropout: on the input of the low-rank branch.
        diagonal: "free" or "relu".
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        n_blocks: int,
        rank: int,
        alpha: float,
        dropout: float = 0.1,
        diagonal: str = "free",
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, n_blocks=n_blocks, rank=rank)
        require_dropout(self, dropout)
        if diagonal not in ("free", "relu"):
            raise UserError(f"ProDiaL: diagonal={diagonal!r}; expected 'free' or 'relu'")
        self.targets, self.n_blocks, self.rank, self.alpha = targets, n_blocks, rank, alpha
        self.dropout, self.diagonal = dropout, diagonal
        self.sites = nn.ModuleDict()

    def attach(self, model: nn.Module) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            module, attribute = owner_module(model, parameter)
            require_ported_linear(module, attribute, parameter, self.name)
            site = Projector(self, module)
            self.sites[site_key(parameter)] = site
            add_weight_delta(model, parameter, self.name, site.transform_delta)
            module.side.add(self.name, site)

    def to_weight_space(self, model: nn.Module) -> None:
        for key, site in self.sites.items():
            parameter = key.replace("/", ".")
            owner_module(model, parameter)[0].side.remove(self.name)
            add_weight_delta(model, parameter, self.name, site.low_rank_delta)

    def param_groups(self) -> list[dict[str, Any]]:
        scales = [site.scale for site in self.sites.values()]
        others = [p for site in self.sites.values() for p in (site.blocks, site.down, site.up)]
        return [
            {"params": scales, "lr_mult": self.lr_mult, "decay_mult": 0.0},
            {"params": others, "lr_mult": self.lr_mult, "decay_mult": self.decay_mult},
        ]


class Projector(nn.Module):
    """One site. Called with activations it is the low-rank branch."""

    def __init__(self, method: ProDiaL, module: nn.Linear) -> None:
        super().__init__()
        self.low_scale, self.dropout = method.alpha / method.rank, method.dropout
        self.relu = method.diagonal == "relu"
        self.size = -(-module.in_features // method.n_blocks)
        blocks = -(-module.in_features // self.size)
        weight = module.weight
        like = {"device": weight.device, "dtype": weight.dtype}
        self.scale = nn.Parameter(torch.ones(module.out_features, **like))
        self.blocks = nn.Parameter(torch.zeros(blocks, self.size, self.size, **like))
        eye = torch.eye(self.size, dtype=torch.bool, device=weight.device)
        self.register_buffer("eye", eye, persistent=False)
        self.down, self.up = low_rank_pair(weight, method.rank)

    @property
    def low_rank(self) -> tuple[Tensor, Tensor, float, float]:
        """down, up, scale, dropout between them: what a port adds to its linear map, for the input `before(x)`."""
        return self.down, self.up, self.low_scale, 0.0

    def before(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.before(x), self.down), self.low_scale * self.up)

    def low_rank_delta(self, weight: Tensor) -> Tensor:
        return self.low_scale * (self.up @ self.down)

    def block_matrices(self) -> Tensor:
        """The diagonal blocks of D_b [blocks, size, size]."""
        return torch.where(self.eye, 1 - F.relu(self.blocks), self.blocks) if self.relu else self.blocks + self.eye

    def transform_delta(self, weight: Tensor) -> Tensor:
        """diag(s) W D_b - W, for W [out, in]."""
        out_features, in_features = weight.shape
        count = self.blocks.shape[0]
        rest = count * self.size - in_features
        parts = (F.pad(weight, (0, rest)) if rest else weight).view(out_features, count, self.size)
        if self.size <= SMALL_BLOCK:
            product = (parts[..., None] * self.block_matrices()).sum(2)
        else:
            product = torch.einsum("obj,bjk->obk", parts, self.block_matrices())
        return self.scale[:, None] * product.flatten(1)[:, :in_features] - weight
