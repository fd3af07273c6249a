"""Additional-scan: extra states of the selective scan (MambaPEFT, arXiv 2411.03855)."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import frozen_weight, scan_weights, weight_port
from mambapeft_vision.utils.errors import UserError


class AdditionalScan(Method):
    """Gives every scan direction k more states and trains only these.

    A_log [E, N] gets k columns; x_proj [R + 2N, E] gets k rows for B and k for C. The extra columns and rows are the
    owned tensors [E, k] and [2k, E] (B rows, then C rows), under the names of the weights they extend. Rows start as
    `nn.Linear` initialises a [2k, E] weight; the A columns never decay. Where the directions share one A_log [K·E, N]
    and one grouped x_proj [K, R + 2N, E], the owned tensors are [K·E, k] and [K, 2k, E].

    Args:
        states: k.
        position: "before" or "after" the old states.
        init: start of the A columns: "copy" the neighbour (the first old state when before, the last when after),
            "arange" (continue S4D-real: -A = N+1 … N+k) or "constant".
        constant: -A of every extra state, with init "constant".
        zero_c: C rows start at zero, so that the model starts as the base model. (B alone still trains them.)
    """

    def __init__(
        self,
        *,
        states: int,
        position: str = "before",
        init: str = "copy",
        constant: float | None = None,
        zero_c: bool = False,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, states=states)
        if position not in ("before", "after"):
            raise UserError(f"AdditionalScan: position={position!r}; expected 'before' or 'after'")
        if init not in ("copy", "arange", "constant"):
            raise UserError(f"AdditionalScan: init={init!r}; expected 'copy', 'arange' or 'constant'")
        if (init == "constant") != (constant is not None) or (constant is not None and not constant > 0):
            raise UserError(
                f"AdditionalScan: init={init!r} with constant={constant!r}; "
                f"expected a number > 0 with init: constant, and none with another init"
            )
        self.states, self.position, self.init = states, position, init
        self.constant, self.zero_c = constant, zero_c
        self.sites = nn.ParameterDict()
        self._columns: list[str] = []

    @property
    def attach_order(self) -> int:
        return 1

    @property
    def identity_at_init(self) -> bool:
        return self.zero_c

    def attach(self, model: Backbone) -> None:
        for name, rows_name in scan_weights(model, self.name):
            A_log, x_proj = frozen_weight(model, name), frozen_weight(model, rows_name)
            self._own(model, name, self._new_columns(A_log), self._widen_state)
            self._own(model, rows_name, self._new_rows(x_proj), partial(self._widen_projection, A_log.shape[1]))
            self._columns.append(site_key(name))

    def _own(self, model: Backbone, name: str, initial: Tensor, widen: Any) -> None:
        key = site_key(name)
        self.sites[key] = nn.Parameter(initial)
        weight_port(model, name).set_reshape(self.name, partial(widen, key=key))

    def _new_columns(self, A_log: Tensor) -> Tensor:
        """[E, N] → the initial extra columns [E, k]."""
        channels, old = A_log.shape
        if self.init == "copy":
            neighbour = A_log[:, :1] if self.position == "before" else A_log[:, -1:]
            return neighbour.detach().repeat(1, self.states)
        if self.init == "arange":
            numbers = torch.arange(old + 1, old + self.states + 1, device=A_log.device, dtype=A_log.dtype)
            return numbers.log().repeat(channels, 1)
        assert self.constant is not None
        return A_log.new_full((channels, self.states), math.log(self.constant))

    def _new_rows(self, x_proj: Tensor) -> Tensor:
        """[..., R + 2N, E] → the initial extra rows [..., 2k, E]."""
        rows = x_proj.detach().new_empty(*x_proj.shape[:-2], 2 * self.states, x_proj.shape[-1])
        for matrix in rows.view(-1, *rows.shape[-2:]):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if self.zero_c:
            rows[..., self.states :, :] = 0
        return rows

    def _widen_state(self, A_log: Tensor, key: str) -> Tensor:
        """[E, N] → [E, N + k]."""
        return torch.cat(self._ordered(self.sites[key], A_log), dim=1)

    def _widen_projection(self, old: int, x_proj: Tensor, key: str) -> Tensor:
        """[dt | B | C] with N rows each of B and C (axis -2) → the same with N + k each."""
        dt, b, c = x_proj.split((x_proj.shape[-2] - 2 * old, old, old), dim=-2)
        new_b, new_c = self.sites[key].chunk(2, dim=-2)
        return torch.cat((dt, *self._ordered(new_b, b), *self._ordered(new_c, c)), dim=-2)

    def _ordered(self, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        return (new, old) if self.position == "before" else (old, new)

    def param_groups(self) -> list[dict[str, Any]]:
        columns = [self.sites[key] for key in self._columns]
        rows = [p for key, p in self.sites.items() if key not in self._columns]
        return [
            {"params": columns, "lr_mult": self.lr_mult, "decay_mult": 0.0},
            {"params": rows, "lr_mult": self.lr_mult, "decay_mult": self.decay_mult},
        ]
