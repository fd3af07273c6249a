"""GPS: gradient-based parameter selection (CVPR 2024, arXiv 2312.10136): for each neuron its most sensitive inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.checks import require_matrix, require_positive
from mambapeft_vision.methods.method import Method, plain_name, site_key
from mambapeft_vision.methods.targets import frozen_weight, group_count, match_or_default, weight_port

#: Weights of linear maps and convolutions; a backbone has some of them.
ROLES = (
    "patch_embed", "in_proj", "conv", "x_proj", "dt_proj", "out_proj", "qkv", "attn_out", "mlp_up", "mlp_gate",
    "mlp_down",
)  # fmt: skip


class GPS(Method):
    """Two phases. (1) For `warmup_steps` nothing but the head trains, and the gradient of the targets is summed. Then,
    for each neuron (row of a weight), the entries with the largest |Σ gradient| are selected. (2) These train, as
    offsets that start at zero; their places are saved with the adapter.

    The head starts at zero, where no gradient reaches the backbone: it has to train while gradients are summed. The
    published method takes them from a contrastive loss on the features, before any training.

    Args:
        targets: roles or patterns of names of weights; None: all of `ROLES` that the backbone has. A convolution's row
            is one output channel; every matrix of a grouped weight [K, rows, columns] selects for itself.
        per_neuron: entries of each row that train (all of them where a row has fewer).
        warmup_steps: optimiser steps of phase 1.
    """

    def __init__(
        self,
        *,
        targets: str | list[str] | None = None,
        per_neuron: int = 1,
        warmup_steps: int = 32,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, per_neuron=per_neuron, warmup_steps=warmup_steps)
        self.targets, self.per_neuron, self.warmup_steps = targets, per_neuron, warmup_steps
        self.sites: Any = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for parameter in match_or_default(model, self.targets, ROLES, self.name):
            weight = frozen_weight(model, parameter)
            require_matrix(weight, parameter, self.name)
            leading = 1 if group_count(model, parameter) is None else 2
            site = Neurons(weight, leading, self.per_neuron)
            self.sites[site_key(parameter)] = site
            weight_port(model, parameter).add(self.name, site)

    @property
    def warming_up(self) -> bool:
        return any(site.gradient is not None for site in self.sites.values())

    def finish_warmup(self) -> str:
        for site in self.sites.values():
            site.select()
        total = sum(site.entries.numel() for site in self.sites.values())
        return (
            f"warm-up finished; {total:,} entries of {len(self.sites)} weights train, up to {self.per_neuron} a neuron"
        )

    def index_limits(self) -> dict[str, int]:
        selected = {key: site for key, site in self.sites.items() if site.places is not None}
        return {f"{plain_name(key)}.places": site.columns for key, site in selected.items()}

    def enter_phase_of(self, saved: Mapping[str, Tensor]) -> None:
        if not saved or any(name.endswith(".gradient") for name in saved):
            return
        for site in self.sites.values():
            if site.gradient is not None:
                site.enter_selection()


class Neurons(nn.Module):
    """One weight [rows, …] or [K, rows, columns]: its gradient is summed first, then some entries of each row train.

    leading: axes in front of the columns, 1 or 2.
    """

    gradient: Tensor | None  # summed, [.., rows, columns]
    places: Tensor | None  # columns of the selected entries, [.., rows, count]
    entries: nn.Parameter | None  # their offsets

    def __init__(self, weight: Tensor, leading: int, count: int) -> None:
        super().__init__()
        self.leading = leading
        flat = weight.detach().flatten(leading)
        self.columns = flat.shape[-1]
        self.count = min(count, self.columns)
        self.register_buffer("gradient", torch.zeros_like(flat))
        self.register_buffer("places", None)
        self.register_parameter("entries", None)

    def forward(self, weight: Tensor) -> Tensor:
        """ΔW in W's shape. While gradients are summed: zeros, whose gradient is W's."""
        if self.gradient is not None and self.training and torch.is_grad_enabled():
            probe = torch.zeros_like(weight, requires_grad=True)
            probe.register_hook(self._sum)
            return probe
        change = torch.zeros_like(weight)
        if self.entries is None or self.places is None:
            return change
        flat = change.flatten(self.leading).scatter(-1, self.places, self.entries.to(weight.dtype))
        return flat.view_as(weight)

    def _sum(self, gradient: Tensor) -> None:
        assert self.gradient is not None
        self.gradient += gradient.flatten(self.leading)

    def select(self) -> None:
        """Starts phase 2 with the entries of the largest gradients."""
        assert self.gradient is not None
        places = self.gradient.abs().topk(self.count).indices.sort(-1).values
        self.enter_selection()
        assert self.places is not None
        self.places.copy_(places)

    def enter_selection(self) -> None:
        """Starts phase 2, the places still to be filled in."""
        assert self.gradient is not None
        shape = (*self.gradient.shape[:-1], self.count)
        self.places = torch.zeros(shape, dtype=torch.int64, device=self.gradient.device)
        self.entries = nn.Parameter(self.gradient.new_zeros(shape))
        self.gradient = None
