"""DiffFit: biases, norms and a factor on what every block adds (ICCV 2023, arXiv 2304.06648)."""

from typing import Any

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.method import plain_name, site_key
from mambapeft_vision.methods.targets import frozen_weight, match_or_default, owner_module, weight_port
from mambapeft_vision.methods.unfreeze import Unfreeze

#: The last linear map of every branch.
OUTPUTS = ("out_proj", "attn_out", "mlp_down")


class DiffFit(Unfreeze):
    """Trains all biases and norms of the backbone themselves, and γ [D], from one, on the output of every branch.

    γ acts on the last linear map of a branch, W' = diag(γ) W and b' = γ ⊙ b, so it costs no pass over activations. All
    tensors have one dimension; they decay only where `decay_mult` says so.

    Args:
        targets: roles or patterns of what trains itself; None: all biases and norms.
        outputs: roles or patterns of the last linear maps; None: all of `OUTPUTS` that the backbone has.
    """

    def __init__(
        self,
        *,
        targets: str | list[str] | None = None,
        outputs: str | list[str] | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 0.0,
    ) -> None:
        super().__init__(targets=targets or ["**.bias", "norm"], lr_mult=lr_mult, decay_mult=decay_mult)
        self.outputs = outputs
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        super().attach(model)
        for parameter in match_or_default(model, self.outputs, OUTPUTS, self.name):
            site = Factor(frozen_weight(model, parameter))
            self.sites[site_key(parameter)] = site
            weight_port(model, parameter).add(self.name, site)
            if getattr(owner_module(model, parameter)[0], "bias", None) is not None:
                weight_port(model, parameter.removesuffix("weight") + "bias").add(self.name, site)

    def owned(self) -> dict[str, nn.Parameter]:
        return {**self._owned, **{plain_name(name): p for name, p in self.named_parameters()}}

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.owned().values()), "lr_mult": self.lr_mult, "decay_mult": self.decay_mult}]


class Factor(nn.Module):
    """γ of one linear map [out, in] and its bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(weight.new_ones(len(weight)))

    def forward(self, tensor: Tensor) -> Tensor:
        """diag(γ) T - T for T [out, in] or [out]."""
        change = self.factor - 1
        return torch.mul(change[:, None] if tensor.ndim == 2 else change, tensor)
