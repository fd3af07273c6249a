"""SPT-LoRA: sensitivity-aware tuning (arXiv 2303.08566): the task says which weights train, and how."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.lora import low_rank_pair
from mambapeft_vision.methods.method import Method, plain_name, site_key
from mambapeft_vision.methods.targets import (
    frozen_weight,
    group_count,
    match_parameters,
    owner_module,
    rows_of,
    weight_port,
)


class SPT(Method):
    """Two phases. (1) For `warmup_steps` nothing but the head trains, and the squared gradient of every entry of the
    targets is summed: its sensitivity. Then the most sensitive entries of all targets together are selected, as many
    as `budget`. (2) A matrix of which at least as many entries are selected as its LoRA would train gets
    ΔW = s · up · down; of the others, and of all vectors, just the selected entries train.

    Selected entries beyond the number that a matrix's LoRA trains are not counted, so exactly `budget` parameters train
    (fewer only if the targets have no more). A weight whose rows the backbone names in blocks (q, k, v; x, z; d, b, c)
    is one matrix for each block, and a grouped weight is one matrix for each group.

    The head starts at zero, where no gradient reaches the backbone: it has to train while sensitivities are measured.

    Args:
        targets: roles or patterns of parameter names.
        budget: the number of parameters that train in phase 2, without the head.
        warmup_steps: optimiser steps of phase 1. Gradients are those of single backward passes.
        rank, scale: r and s of the LoRA.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        budget: int,
        warmup_steps: int = 32,
        rank: int = 8,
        scale: float = 1.0,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, budget=budget, warmup_steps=warmup_steps, rank=rank)
        self.targets, self.budget, self.warmup_steps = targets, budget, warmup_steps
        self.rank, self.scale = rank, scale
        self.sites: Any = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            weight, groups = frozen_weight(model, parameter), group_count(model, parameter)
            is_matrix = weight.ndim == 2 and owner_module(model, parameter)[1] == "weight"
            blocks = model.row_blocks(parameter) if is_matrix or groups is not None else {}
            named: list[tuple[str | None, slice | None]] = [*blocks.items()] or [(None, None)]
            for block, rows in named:
                name, part = parameter if block is None else f"{parameter}.{block}", rows_of(weight, rows)
                port = weight_port(model, parameter)
                if groups is None:
                    site = self._sensitive(name, part, is_matrix)
                    port.add(self.name, site.delta, rows)
                else:
                    sites = [self._sensitive(f"{name}.{i}", matrix, True) for i, matrix in enumerate(part)]
                    port.add(self.name, GroupedDelta(sites), rows)

    def _sensitive(self, name: str, weight: Tensor, is_matrix: bool) -> "Sensitive":
        site = Sensitive(weight, self.rank if is_matrix else None, self.scale)
        self.sites[site_key(name)] = site
        return site

    @property
    def warming_up(self) -> bool:
        return any(site.measuring for site in self.sites.values())

    @torch.no_grad()
    def finish_warmup(self) -> str:
        sites = list(self.sites.values())
        rankings = [site.ranking() for site in sites]
        scores = torch.cat([scores for scores, _ in rankings])
        # A model without values is only there to be counted: any selection trains as many numbers.
        scores = torch.zeros(scores.shape, device="cpu") if scores.is_meta else scores.cpu()
        best = scores.argsort(descending=True, stable=True)[: self.budget]
        ends = torch.tensor([site.limit for site in sites], device="cpu").cumsum(0)
        chosen = torch.bucketize(best, ends, right=True).bincount(minlength=len(sites)).tolist()
        for site, count, (_, entries) in zip(sites, chosen, rankings):
            site.select(entries[:count])
        structured = sum(site.down is not None for site in sites)
        alone = sum(site.entries.numel() for site in sites if site.entries is not None)
        return f"warm-up finished; LoRA on {structured} of {len(sites)} weights, and {alone:,} single entries train"

    def index_limits(self) -> dict[str, int]:
        selected = {plain_name(key): site for key, site in self.sites.items() if site.places is not None}
        return {f"{name}.places": site.weights for name, site in selected.items()}

    def enter_phase_of(self, saved: Mapping[str, Tensor]) -> None:
        if not saved or any(name.endswith(".sensitivity") for name in saved):
            return
        for key, site in self.sites.items():
            name = plain_name(key)
            if not site.measuring:
                continue
            if f"{name}.down" in saved and site.low_rank:
                site.enter_lora()
            else:
                site.enter_entries(saved[f"{name}.places"].numel() if f"{name}.places" in saved else 0)


class Sensitive(nn.Module):
    """One weight (or block of its rows): measured first, then with a LoRA, with single trained entries, or frozen.

    Args:
        weight: W, any shape; frozen.
        rank: rank of the LoRA; None: only single entries can train.
        scale: factor of the LoRA.
    """

    first_down: Tensor
    first_up: Tensor
    sensitivity: Tensor | None  # in W's shape, while it is measured
    places: Tensor | None  # places of the selected entries in the flat weight
    entries: nn.Parameter | None
    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(self, weight: Tensor, rank: int | None, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weights = self.limit = weight.numel()  # limit: the most entries or parameters that can train
        self.low_rank = False
        if rank is not None and rank * sum(weight.shape) < self.limit:
            self.low_rank, self.limit = True, rank * sum(weight.shape)
            down, up = low_rank_pair(weight, rank)  # drawn now: the draw must not depend on what is selected
            self.register_buffer("first_down", down.detach(), persistent=False)
            self.register_buffer("first_up", up.detach(), persistent=False)
        self.register_buffer("sensitivity", torch.zeros_like(weight))
        self.register_buffer("places", None)
        for name in ("entries", "down", "up"):
            self.register_parameter(name, None)

    @property
    def measuring(self) -> bool:
        return self.sensitivity is not None

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW in W's shape. While measuring: zeros, whose gradient is W's."""
        if self.measuring and self.training and torch.is_grad_enabled():
            probe = torch.zeros_like(weight, requires_grad=True)
            probe.register_hook(self._measure)
            return probe
        if self.down is not None and self.up is not None:
            return self.scale * self.up @ self.down
        change = torch.zeros_like(weight)
        if self.entries is None or self.places is None:
            return change
        return change.flatten().index_put((self.places,), self.entries.to(weight.dtype)).view_as(weight)

    def _measure(self, gradient: Tensor) -> None:
        assert self.sensitivity is not None
        self.sensitivity += gradient.square()

    def ranking(self) -> tuple[Tensor, Tensor]:
        """The `limit` highest sensitivities, highest first, and their places in the flat weight."""
        assert self.sensitivity is not None
        scores, places = self.sensitivity.flatten().topk(self.limit)
        return scores, places

    def select(self, places: Tensor) -> None:
        """Starts phase 2 with these places [count <= limit] of the flat weight selected."""
        if self.low_rank and len(places) == self.limit:
            self.enter_lora()
            return
        self.enter_entries(len(places))
        if self.places is not None:
            self.places.copy_(places.sort().values)

    def enter_lora(self) -> None:
        """Continues with a LoRA, which starts at zero."""
        self.down, self.up = nn.Parameter(self.first_down.clone()), nn.Parameter(self.first_up.clone())
        self.sensitivity = None

    def enter_entries(self, count: int) -> None:
        """Continues with `count` single entries, whose places are still to be filled in; 0: frozen."""
        assert self.sensitivity is not None
        if count:
            self.places = torch.zeros(count, dtype=torch.int64, device=self.sensitivity.device)
            self.entries = nn.Parameter(self.sensitivity.new_zeros(count))
        self.sensitivity = None


class GroupedDelta:
    """ΔW of a grouped weight [K, rows, columns], matrix by matrix."""

    def __init__(self, sites: list[Sensitive]) -> None:
        self.sites = sites

    def __call__(self, weight: Tensor) -> Tensor:
        return torch.stack([site.delta(matrix) for site, matrix in zip(self.sites, weight)])
