"""Houlsby adapters: a bottleneck behind every residual branch (ICML 2019, arXiv 1902.00751)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, TokenLayout
from mambapeft_vision.methods.checks import branches_of, require_positive, undecayed_biases
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import like
from mambapeft_vision.utils.errors import UserError


class Houlsby(Method):
    """h ← h + up(GELU(down(h))) for the output h of every branch (mixer, MLP), before it joins the residual sum.

    Both maps have biases, which start at zero and have no weight decay.

    Args:
        dim: width of the bottleneck.
        init: "published", weights truncated normal with deviation 0.01, within two of them; or "zero", up at zero.
    """

    merge_obstacle = "the GELU between down and up is no function of a weight"

    def __init__(
        self, *, dim: int = 32, init: str = "published", lr_mult: float = 1.0, decay_mult: float = 1.0
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, dim=dim)
        if init not in ("published", "zero"):
            raise UserError(f"Houlsby: init={init!r}; expected 'published' or 'zero'")
        self.dim, self.init = dim, init
        self.sites = nn.ModuleDict()

    @property
    def identity_at_init(self) -> bool:
        return self.init == "zero"

    def attach(self, model: Backbone) -> None:
        for port, width in branches_of(model, self.name):
            site = SerialAdapter(like(model).new_empty(self.dim, width), F.gelu)
            nn.init.trunc_normal_(site.down, std=0.01, a=-0.02, b=0.02)
            if self.init == "published":
                nn.init.trunc_normal_(site.up, std=0.01, a=-0.02, b=0.02)
            self.sites[site_key(port.name)] = site
            port.add(self.name, site)

    def param_groups(self) -> list[dict[str, Any]]:
        return undecayed_biases(self)


class SerialAdapter(nn.Module):
    """One adapter: what it adds to a branch's output [B, L, D]. `like` [r, D] gives sizes, device and dtype.

    `down` is left to be initialised; `up` and both biases are zero.
    """

    def __init__(self, like: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        rank, dim = like.shape
        self.down = nn.Parameter(torch.empty_like(like))
        self.down_bias = nn.Parameter(like.new_zeros(rank))
        self.up = nn.Parameter(like.new_zeros(dim, rank))
        self.up_bias = nn.Parameter(like.new_zeros(dim))

    def forward(self, x: Tensor, out: Tensor, layout: TokenLayout) -> Tensor:
        return F.linear(self.activation(F.linear(out, self.down, self.down_bias)), self.up, self.up_bias)
