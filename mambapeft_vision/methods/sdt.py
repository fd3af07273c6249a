"""SDLoRA / SDT: sparse dimension tuning of the state-space part, with LoRA on the projections (arXiv 2410.09016)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.lora import LoRA, LowRank
from mambapeft_vision.methods.method import plain_name, site_key
from mambapeft_vision.methods.targets import frozen_weight, group_count, scan_weights, weight_port
from mambapeft_vision.utils.errors import UserError

_OFF = 10.0  # A_log of a state that is switched off: A = -exp(10) forgets at once


class SDT(LoRA):
    """Two phases. (1) For `warmup_steps`, a full Δ on A_log and LoRA on the projections train. Then, for each layer and
    direction, the channels whose A moved most (Σ_n ΔA²) are selected, and in each of them the states that moved most.
    (2) Everything starts anew; Δ on the selected entries of A_log, and on the B and C rows of x_proj at the selected
    channels, trains, and LoRA again. The selection is saved with the adapter.

    Directions that share one A_log [K·E, N] and one grouped x_proj [K, R + 2N, E] select for themselves.

    In a hybrid the other methods, and always the head, keep in phase 2 what they learned in phase 1.

    Args:
        warmup_steps: optimiser steps of phase 1.
        f_channels: share of the E channels that is not selected; E - round(f_channels · E) are, at least one.
        f_states: share of the N states that is not selected in a selected channel; rounded in the same way.
        f_off: share of the E channels, those that moved least, whose states are all switched off (A_log = 10; the
            zero group of the paper's first version).
        targets, rank, scale, dropout: settings of the LoRA.
    """

    def __init__(
        self,
        *,
        warmup_steps: int = 500,
        f_channels: float = 0.99,
        f_states: float = 0.75,
        f_off: float = 0.0,
        targets: str | list[str] = "out_proj",
        rank: int = 8,
        scale: float = 1.0,
        dropout: float = 0.1,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(
            targets=targets, rank=rank, scale=scale, dropout=dropout, lr_mult=lr_mult, decay_mult=decay_mult
        )
        require_positive(self, warmup_steps=warmup_steps)
        for name, share in (("f_channels", f_channels), ("f_states", f_states), ("f_off", f_off)):
            if not 0 <= share < 1:
                raise UserError(f"SDT: {name}={share!r}; expected a share in [0, 1)")
        if f_off > f_channels:
            raise UserError(
                f"SDT: f_off={f_off} of the channels cannot be off when only f_channels={f_channels} are left; "
                f"set f_channels higher or f_off lower"
            )
        self.warmup_steps = warmup_steps
        self.f_channels, self.f_states, self.f_off = f_channels, f_states, f_off

    @property
    def identity_at_init(self) -> bool:
        """Each phase starts as the base model, but for states that are switched off."""
        return not any(site.selected and site.off for site in self.sparse_states)

    def attach(self, model: Backbone) -> None:
        weights = scan_weights(model, self.name)
        super().attach(model)
        self._initial_downs = {k: s.down.detach().clone() for k, s in self.sites.items() if isinstance(s, LowRank)}
        for name, projection in weights:
            groups = group_count(model, projection)
            parts = frozen_weight(model, name).chunk(groups or 1)
            sites = [self._sparse_states(part) for part in parts]
            for i, site in enumerate(sites):
                self.sites[site_key(name if groups is None else f"{name}.{i}")] = site
            states = sites[0] if groups is None else GroupedStates(sites)
            weight_port(model, name).add(self.name, states.state_delta)
            weight_port(model, projection).add(self.name, states.row_delta)

    def _sparse_states(self, A_log: Tensor) -> "SparseStates":
        channels, states = A_log.shape
        kept = _kept(channels, self.f_channels), _kept(states, self.f_states)
        return SparseStates(A_log, *kept, off=round(self.f_off * channels))

    @property
    def sparse_states(self) -> list["SparseStates"]:
        """The modules that hold the selected states."""
        return [site for site in self.sites.values() if isinstance(site, SparseStates)]

    @property
    def warming_up(self) -> bool:
        return any(not site.selected for site in self.sparse_states)

    def finish_warmup(self) -> str:
        for site in self.sparse_states:
            site.select()
        with torch.no_grad():
            for key, down in self._initial_downs.items():
                self.sites[key].down.copy_(down)
                self.sites[key].up.zero_()
        first = self.sparse_states[0]
        return (
            f"warm-up finished; of each layer and direction {first.kept[0]} of {first.shape[0]} channels "
            f"and {first.kept[1]} of {first.shape[1]} states in each are selected"
        )

    def index_limits(self) -> dict[str, int]:
        limits: dict[str, int] = {}
        for key, site in self.sites.items():
            if isinstance(site, SparseStates) and site.selected:
                channels, states = site.shape
                places = {"channels": channels, "states": states, "off_channels": channels}
                limits |= {f"{plain_name(key)}.{name}": n for name, n in places.items() if hasattr(site, name)}
        return limits

    def enter_phase_of(self, saved: Mapping[str, Tensor]) -> None:
        selected = any(name.endswith(".channels") for name in saved)
        for site in self.sparse_states:
            if selected and not site.selected:
                site.enter_selection()


class SparseStates(nn.Module):
    """One direction of one mixer: a full offset of A_log while warming up, then offsets of what was selected.

    Args:
        A_log: [E, N], frozen.
        channels: c, how many to select. states: s, how many in each. off: o, channels to switch off.
    """

    offset: nn.Parameter | None
    channels: Tensor  # [c], these from here on once selected
    states: Tensor  # [c, s]
    off_channels: Tensor  # [o]
    entries: nn.Parameter  # [c, s]
    rows: nn.Parameter  # [2N, c]

    def __init__(self, A_log: Tensor, channels: int, states: int, off: int) -> None:
        super().__init__()
        self.kept, self.shape, self.off = (channels, states), tuple(A_log.shape), off
        self.offset = nn.Parameter(torch.zeros_like(A_log))

    @property
    def selected(self) -> bool:
        return self.offset is None

    @torch.no_grad()
    def select(self) -> None:
        """Chooses channels and states by how far the warm-up moved A_log, and starts phase 2."""
        assert self.offset is not None
        moved = self.offset.square()
        ranking = moved.sum(1).argsort(descending=True, stable=True)
        channels = ranking[: self.kept[0]].sort().values
        order = moved[channels].argsort(dim=1, descending=True, stable=True)
        self.enter_selection()
        self.channels.copy_(channels)
        self.states.copy_(order[:, : self.kept[1]])
        if self.off:
            self.off_channels.copy_(ranking[-self.off :].sort().values)

    def enter_selection(self) -> None:
        """Replaces the full offset by those of a selection, which is still to be filled in."""
        assert self.offset is not None
        like, (channels, states) = self.offset, self.kept
        self.offset = None
        self.register_buffer("channels", torch.zeros(channels, dtype=torch.int64, device=like.device))
        self.register_buffer("states", self.channels.new_zeros(channels, states))
        if self.off:
            self.register_buffer("off_channels", self.channels.new_zeros(self.off))
        self.entries = nn.Parameter(like.detach().new_zeros(channels, states))
        self.rows = nn.Parameter(like.detach().new_zeros(2 * self.shape[1], channels))

    def state_delta(self, A_log: Tensor) -> Tensor:
        """Δ of A_log [E, N]."""
        if self.offset is not None:
            return self.offset
        place = self.channels[:, None]
        delta = torch.zeros_like(A_log).index_put((place, self.states), self.entries.to(A_log.dtype))
        if not self.off:
            return delta
        return delta.index_copy(0, self.off_channels, _OFF - A_log[self.off_channels])

    def row_delta(self, x_proj: Tensor) -> Tensor:
        """Δ of x_proj [R + 2N, E]: its B and C rows at the selected channels."""
        if not self.selected:
            return torch.zeros_like(x_proj)
        rows = self.rows.new_zeros(self.rows.shape[0], x_proj.shape[1]).index_copy(1, self.channels, self.rows)
        return F.pad(rows, (0, 0, x_proj.shape[0] - rows.shape[0], 0))


class GroupedStates:
    """The offsets of K directions that share one A_log [K·E, N] and one x_proj [K, R + 2N, E]."""

    def __init__(self, sites: list[SparseStates]) -> None:
        self.sites = sites

    def state_delta(self, A_log: Tensor) -> Tensor:
        return torch.cat([site.state_delta(part) for site, part in zip(self.sites, A_log.chunk(len(self.sites)))])

    def row_delta(self, x_proj: Tensor) -> Tensor:
        return torch.stack([site.row_delta(part) for site, part in zip(self.sites, x_proj)])


def _kept(total: int, share: float) -> int:
    return max(1, total - round(share * total))
