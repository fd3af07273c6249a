"""ProDiaL: projector-targeted diagonal-centric linear transformation (arXiv 2411.15224)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, LowRankBranch, SidePort
from mambapeft_vision.methods.checks import require_dropout, require_ported_linear, require_positive
from mambapeft_vision.methods.lora import low_rank_pair
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import frozen_weight, group_count, match_parameters, weight_port
from mambapeft_vision.utils.errors import UserError

# Blocks up to this size are multiplied out number by number: batched products of 2x2 matrices are slow on a GPU.
SMALL_BLOCK = 4


class ProDiaL(Method):
    """W' = diag(s) W D_b + (α/r) up · down, on the projectors (in_proj, out_proj or both).

    D_b is block-diagonal on the input side. It comes from raw blocks a (zero at first): off-diagonal entries a,
    diagonal entries 1 + a ("free") or 1 - relu(a) ("relu", as released). relu has no gradient at its zero start, so
    the released form never moves the diagonal. s starts at one and has no weight decay (which would pull the weights
    to zero). The low-rank branch runs on activations, with dropout on its input. Every matrix of a grouped weight
    [K, rows, columns] has its own s, D_b and low-rank pair, which all act on the weight, without dropout.

    Args:
        targets: roles or patterns of names of linear maps with a side port, or of grouped weights.
        n_blocks: blocks of D_b; each has ceil(in / n_blocks) inputs, the last one the remaining inputs.
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
        self.sites: Any = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            side, groups = self._side(model, parameter), group_count(model, parameter)
            site = Projector(self, frozen_weight(model, parameter), groups)
            self.sites[site_key(parameter)] = site
            port = weight_port(model, parameter)
            port.add(self.name, site.transform_delta)
            if side is None:
                port.add(self.name, site.low_rank_delta)
            else:
                side.add(LowRankBranch(self.name, site, site.low_scale, self.dropout, "input"))

    def _side(self, model: Backbone, parameter: str) -> SidePort | None:
        """Where the low-rank branch runs; None: on the weight, as a grouped weight has no port on activations."""
        if group_count(model, parameter) is None:
            return require_ported_linear(model, parameter, self.name)[1]
        if self.dropout:
            raise UserError(f"{self.name}: {parameter} has no port on activations; set dropout: 0")
        return None

    def to_weight_space(self, model: Backbone) -> None:
        for key, site in self.sites.items():
            parameter = key.replace("/", ".")
            side = self._side(model, parameter)
            if side is not None:
                side.remove(self.name)
                weight_port(model, parameter).add(self.name, site.low_rank_delta)

    def param_groups(self) -> list[dict[str, Any]]:
        scales = [site.scale for site in self.sites.values()]
        others = [p for site in self.sites.values() for p in (site.blocks, site.down, site.up)]
        return [
            {"params": scales, "lr_mult": self.lr_mult, "decay_mult": 0.0},
            {"params": others, "lr_mult": self.lr_mult, "decay_mult": self.decay_mult},
        ]


class Projector(nn.Module):
    """The parts of one weight [out, in]; with `groups` K of K matrices [K, out, in], each part with that axis first."""

    def __init__(self, method: ProDiaL, weight: Tensor, groups: int | None) -> None:
        super().__init__()
        self.low_scale, self.relu = method.alpha / method.rank, method.diagonal == "relu"
        *leading, out_features, in_features = weight.shape
        self.size = -(-in_features // method.n_blocks)
        blocks = -(-in_features // self.size)
        self.scale = nn.Parameter(weight.detach().new_ones(*leading, out_features))
        self.blocks = nn.Parameter(weight.detach().new_zeros(*leading, blocks, self.size, self.size))
        self.eye: Tensor
        eye = torch.eye(self.size, dtype=torch.bool, device=weight.device)
        self.register_buffer("eye", eye, persistent=False)
        self.down, self.up = low_rank_pair(weight, method.rank, groups)

    def low_rank_delta(self, weight: Tensor) -> Tensor:
        return self.low_scale * (self.up @ self.down)

    def block_matrices(self) -> Tensor:
        """The diagonal blocks of D_b [..., blocks, size, size]."""
        return torch.where(self.eye, 1 - F.relu(self.blocks), self.blocks) if self.relu else self.blocks + self.eye

    def transform_delta(self, weight: Tensor) -> Tensor:
        """diag(s) W D_b - W, for W [..., out, in]."""
        in_features, count = weight.shape[-1], self.blocks.shape[-3]
        rest = count * self.size - in_features
        parts = (F.pad(weight, (0, rest)) if rest else weight).unflatten(-1, (count, self.size))
        if self.size <= SMALL_BLOCK:
            product = (parts[..., None] * self.block_matrices().unsqueeze(-4)).sum(-2)
        else:
            product = torch.einsum("...obj,...bjk->...obk", parts, self.block_matrices())
        return self.scale[..., None] * product.flatten(-2)[..., :in_features] - weight
