"""Convpass: convolutional bypasses beside the branches of every block (IJCAI 2024, arXiv 2207.07039)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, TokenLayout
from mambapeft_vision.backbones.layout import select
from mambapeft_vision.methods.checks import branches_of, require_dropout, require_positive, undecayed_biases
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import like
from mambapeft_vision.methods.tokens import position_tensor
from mambapeft_vision.utils.errors import UserError


class Convpass(Method):
    """out = branch(h) + s · up(dropout(act(conv(act(down(h)))))), h the normalised tokens that enter the branch.

    The branches are the token mixer and, where there is one, the MLP. conv is 3x3 on the grid of patches; a class or
    register token or a prompt goes through the same convolution by itself, as a grid of one. act(x) is
    x · sigmoid(1.702 x). down starts as Xavier, up at zero, all biases too. Biases have no weight decay.

    Args:
        dim: channels of the convolution.
        scale: s; the published one is chosen for each task, from 0.01 to 100.
        dropout: in front of up.
        conv_init: "identity", a one in the middle of each channel's own filter; or "xavier".
    """

    merge_obstacle = "the convolution over the grid is no function of a weight"

    def __init__(
        self,
        *,
        dim: int = 8,
        scale: float = 1.0,
        dropout: float = 0.1,
        conv_init: str = "identity",
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, dim=dim)
        require_dropout(self, dropout)
        if conv_init not in ("identity", "xavier"):
            raise UserError(f"Convpass: conv_init={conv_init!r}; expected 'identity' or 'xavier'")
        self.dim, self.scale, self.dropout, self.conv_init = dim, scale, dropout, conv_init
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for port, width in branches_of(model, self.name):
            site = Bypass(self, like(model).new_empty(self.dim, width))
            self.sites[site_key(port.name)] = site
            port.add(self.name, site)

    def param_groups(self) -> list[dict[str, Any]]:
        return undecayed_biases(self)


class Bypass(nn.Module):
    """One bypass, [B, L, D] → [B, L, D]. `like` [r, D] gives sizes, device and dtype."""

    def __init__(self, method: Convpass, like: Tensor) -> None:
        super().__init__()
        self.scale, self.dropout = method.scale, method.dropout
        rank, dim = like.shape
        self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty_like(like)))
        self.down_bias = nn.Parameter(like.new_zeros(rank))
        self.conv = nn.Parameter(like.new_zeros(rank, rank, 3, 3))
        self.conv_bias = nn.Parameter(like.new_zeros(rank))
        self.up = nn.Parameter(like.new_zeros(dim, rank))
        self.up_bias = nn.Parameter(like.new_zeros(dim))
        with torch.no_grad():
            if method.conv_init == "identity":
                self.conv[:, :, 1, 1] = torch.eye(rank)
            else:
                nn.init.xavier_uniform_(self.conv)

    def forward(self, x: Tensor, out: Tensor, layout: TokenLayout) -> Tensor:
        low = self._convolved(_quick_gelu(F.linear(x, self.down, self.down_bias)), layout)
        low = F.dropout(_quick_gelu(low), self.dropout, self.training)
        return F.linear(low, self.scale * self.up, self.scale * self.up_bias)

    def _convolved(self, low: Tensor, layout: TokenLayout) -> Tensor:
        """[B, L, r] → [B, L, r]."""
        grid = select(low, layout.patches).transpose(1, 2).unflatten(2, layout.grid)
        grid = F.conv2d(grid, self.conv, self.conv_bias, padding=1)
        alone = F.linear(low, self.conv[:, :, 1, 1], self.conv_bias)  # a grid of one: only the middle tap counts
        patches = position_tensor(layout.patches, low.device)
        return alone.index_copy(1, patches, grid.flatten(2).transpose(1, 2))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
