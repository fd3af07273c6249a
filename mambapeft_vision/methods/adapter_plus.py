"""Adapter+ (arXiv 2406.06820): adapters after the blocks of a vision transformer, with a learned scale a channel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, FunctionBranch
from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import like
from mambapeft_vision.utils.errors import UserError


class AdapterPlus(Method):
    """x ← x + s ⊙ up(GELU(down(x))) after every block.

    Weights start truncated normal with deviation 0.01 (Houlsby), biases at zero, s [D] at one, so the model does not
    start as the base model. Biases and s have no weight decay.

    Args:
        dim: width of the bottleneck.
        drop_path: probability that an adapter is left out for a sample in training; the same in every block, and
            beside the backbone's own drop path (both as in the authors' configuration).
    """

    identity_at_init = False
    merge_obstacle = "the GELU between down and up is no function of a weight"

    def __init__(self, *, dim: int = 8, drop_path: float = 0.1, lr_mult: float = 1.0, decay_mult: float = 1.0) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, dim=dim)
        if not 0 <= drop_path < 1:
            raise UserError(f"AdapterPlus: drop_path={drop_path!r}; expected 0 <= drop_path < 1")
        self.dim, self.drop_path = dim, drop_path
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for block in model.blocks:
            if block.after is None:
                raise UserError(
                    f"{self.name} works after every block, but {type(model).__name__} has no such place in "
                    f"{block.name}; use backbone=vit_s"
                )
            site = ScaledBottleneck(like(model).new_empty(self.dim, block.embed_dim), self.drop_path)
            self.sites[site_key(block.name)] = site
            block.after.add(FunctionBranch(self.name, site))

    def param_groups(self) -> list[dict[str, Any]]:
        owned = list(self.owned().values())
        return [
            {"params": [p for p in owned if p.ndim == 2], "lr_mult": self.lr_mult, "decay_mult": self.decay_mult},
            {"params": [p for p in owned if p.ndim == 1], "lr_mult": self.lr_mult, "decay_mult": 0.0},
        ]


class ScaledBottleneck(nn.Module):
    """One site: [B, L, D] → s ⊙ up(GELU(down(x))). `like` [r, D] gives sizes, device and dtype."""

    def __init__(self, like: Tensor, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        rank, dim = like.shape
        self.down = nn.Parameter(like.new_empty(rank, dim))
        self.down_bias = nn.Parameter(like.new_zeros(rank))
        self.up = nn.Parameter(like.new_empty(dim, rank))
        self.up_bias = nn.Parameter(like.new_zeros(dim))
        self.scale = nn.Parameter(like.new_ones(dim))
        for weight in (self.down, self.up):
            nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor) -> Tensor:
        low = F.gelu(F.linear(x, self.down, self.down_bias))
        out = self.scale * F.linear(low, self.up, self.up_bias)
        if not (self.training and self.drop_path):
            return out
        keep = 1.0 - self.drop_path
        return out * (torch.rand(out.shape[0], 1, 1, device=out.device) < keep).to(out.dtype) / keep
