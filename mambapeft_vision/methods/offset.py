"""Partial tuning: a zero-initialised offset on frozen tensors (MambaPEFT, arXiv 2411.03855)."""

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import frozen_weight, match_parameters, weight_port


class Offset(Method):
    """effective = frozen + Δ, Δ trained from zero. Weight decay on Δ pulls towards the pretrained value.

    For A the offset acts in log space: A = -exp(A_log + Δ).

    Args:
        targets: roles (A_log, D, conv, dt_bias, cls_token, pos_embed, …) or patterns of parameter names.
    """

    def __init__(self, *, targets: str | list[str], lr_mult: float = 1.0, decay_mult: float = 1.0) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        self.targets = targets
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            site = Delta(frozen_weight(model, parameter))
            self.sites[site_key(parameter)] = site
            weight_port(model, parameter).add(self.name, site)


class Delta(nn.Module):
    """The offset of one tensor."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(like))

    def forward(self, weight: Tensor) -> Tensor:
        return self.offset
