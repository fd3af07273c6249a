"""Pfeiffer adapters: one bottleneck for each block (AdapterFusion, EACL 2021, arXiv 2005.00247)."""

import math
from typing import Any

import torch.nn.functional as F
from torch import nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.checks import branches_of, require_positive, undecayed_biases
from mambapeft_vision.methods.houlsby import SerialAdapter
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import like


class Pfeiffer(Method):
    """h ← h + up(ReLU(down(h))) for the output h of each block's last branch, before it joins the residual sum.

    The last branch is the MLP, and the mixer where a block has none. down starts as `nn.Linear` does, up and both
    biases at zero. Biases have no weight decay.

    Args:
        dim: width of the bottleneck.
    """

    merge_obstacle = "the ReLU between down and up is no function of a weight"

    def __init__(self, *, dim: int = 32, lr_mult: float = 1.0, decay_mult: float = 1.0) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, dim=dim)
        self.dim = dim
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for port, width in branches_of(model, self.name, last_only=True):
            site = SerialAdapter(like(model).new_empty(self.dim, width), F.relu)
            nn.init.kaiming_uniform_(site.down, a=math.sqrt(5))
            self.sites[site_key(port.name)] = site
            port.add(self.name, site)

    def param_groups(self) -> list[dict[str, Any]]:
        return undecayed_biases(self)
