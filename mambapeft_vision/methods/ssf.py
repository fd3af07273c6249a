"""SSF: scaling and shifting features (NeurIPS 2022, arXiv 2210.08823)."""

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, Port
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import frozen_weight, match_or_default, owner_module, weight_port
from mambapeft_vision.utils.errors import UserError

#: After these the published method scales and shifts; a backbone has some of them.
ROLES = ("patch_embed", "norm", "in_proj", "out_proj", "qkv", "attn_out", "mlp_up", "mlp_down")
SPREAD = 0.02  # standard deviation of the published start


class SSF(Method):
    """y ← γ ⊙ y + β after norms, linear maps and the patch embedding, γ and β [features].

    It acts on weights: W' = diag(γ) W, b' = γ ⊙ b + β. A map without bias adds β to its output; such a β cannot be
    merged. There is no weight decay by default, which would pull γ to zero.

    Args:
        targets: roles or patterns of names of weights; None: all of `ROLES` that the backbone has.
        init: "published", γ ~ N(1, 0.02²) and β ~ N(0, 0.02²); or "zero", γ = 1 and β = 0.
    """

    def __init__(
        self,
        *,
        targets: str | list[str] | None = None,
        init: str = "published",
        lr_mult: float = 1.0,
        decay_mult: float = 0.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        if init not in ("published", "zero"):
            raise UserError(f"SSF: init={init!r}; expected 'published' or 'zero'")
        self.targets, self.init = targets, init
        self.sites = nn.ModuleDict()

    @property
    def identity_at_init(self) -> bool:
        return self.init == "zero"

    def attach(self, model: Backbone) -> None:
        for parameter in match_or_default(model, self.targets, ROLES, self.name):
            module, attribute = owner_module(model, parameter)
            if attribute != "weight":
                continue  # the role `norm` names biases too
            site = ScaleAndShift(frozen_weight(model, parameter), self.init)
            self.sites[site_key(parameter.removesuffix(".weight"))] = site
            weight_port(model, parameter).add(self.name, site.scale_delta)
            if getattr(module, "bias", None) is not None:
                weight_port(model, parameter.removesuffix("weight") + "bias").add(self.name, site.bias_delta)
                continue
            offset = getattr(module, "offset", None)
            if not isinstance(offset, Port):
                raise UserError(
                    f"{self.name}: {parameter} has neither a bias nor a port for one, so there is no place for β; "
                    f"choose targets among {', '.join(role for role in ROLES if role in model.roles)}"
                )
            offset.set(self.name, site.shift_value)
            self.merge_obstacle = "β is a bias, which some of its maps do not have"


class ScaleAndShift(nn.Module):
    """γ and β of one weight [features, …]."""

    def __init__(self, weight: Tensor, init: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(weight.new_ones(len(weight)))
        self.shift = nn.Parameter(weight.new_zeros(len(weight)))
        if init == "published":
            nn.init.normal_(self.scale, mean=1.0, std=SPREAD)
            nn.init.normal_(self.shift, std=SPREAD)

    def scale_delta(self, weight: Tensor) -> Tensor:
        """diag(γ) W - W."""
        return (self.scale - 1).view(-1, *[1] * (weight.ndim - 1)) * weight

    def bias_delta(self, bias: Tensor) -> Tensor:
        """γ ⊙ b + β - b."""
        return torch.addcmul(self.shift, self.scale - 1, bias)

    def shift_value(self) -> Tensor:
        """β, for a map without bias."""
        return self.shift
