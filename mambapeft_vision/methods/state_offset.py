"""State-offset tuning (arXiv 2503.03499): a learned constant added to the state, or to the output, of the scan."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mambapeft_vision.methods.method import Method, mixers_of, site_key
from mambapeft_vision.utils.errors import UserError


class StateOffset(Method):
    """State form: y_t = C_t (h_t + h') + D u_t. Output form: y_t = C_t h_t + D u_t + y'. Both before the gate.

    h' [E, N] or y' [E] of every mixer and direction start at zero.

    Args:
        form: "state" or "output".
    """

    attach_order: ClassVar[int] = 2  # h' has as many states as the scan will have
    merge_obstacle = "the offset is added inside the scan, where no weight is"

    def __init__(self, *, form: str = "state", lr_mult: float = 1.0, decay_mult: float = 1.0) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        if form not in ("state", "output"):
            raise UserError(f"StateOffset: form={form!r}; expected 'state' or 'output'")
        self.form = form
        self.sites = nn.ModuleDict()

    def attach(self, model: nn.Module) -> None:
        for i, mixer in enumerate(mixers_of(model, self.name)):
            like = mixer.A_log if self.form == "state" else mixer.D
            site = DirectionOffsets(like)
            self.sites[site_key(f"layers.{i}.mixer")] = site
            port = mixer.state_offset if self.form == "state" else mixer.output_offset
            port.set(self.name, site)


class DirectionOffsets(nn.Module):
    """One mixer's pair of offsets."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.forward_offset = nn.Parameter(torch.zeros_like(like, requires_grad=False))
        self.backward_offset = nn.Parameter(torch.zeros_like(like, requires_grad=False))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.forward_offset, self.backward_offset
