"""State-offset tuning (arXiv 2503.03499): a learned constant added to the state, or to the output, of the scan."""

from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import like, mixers_of
from mambapeft_vision.utils.errors import UserError


class StateOffset(Method):
    """State form: y_t = C_t (h_t + h') + D u_t. Output form: y_t = C_t h_t + D u_t + y'. Both before the gate.

    h' [E, N] or y' [E] of every mixer and direction start at zero.

    Args:
        form: "state" or "output".
    """

    attach_order = 2  # h' has as many states as the scan will have
    merge_obstacle = "the offset is added inside the scan, where no weight is"

    def __init__(self, *, form: str = "state", lr_mult: float = 1.0, decay_mult: float = 1.0) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        if form not in ("state", "output"):
            raise UserError(f"StateOffset: form={form!r}; expected 'state' or 'output'")
        self.form = form
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for mixer in mixers_of(model, self.name):
            shape = (mixer.d_inner, mixer.states) if self.form == "state" else (mixer.d_inner,)
            site = DirectionOffsets(like(model).new_zeros(shape), mixer.suffixes)
            self.sites[site_key(mixer.name)] = site
            port = mixer.state_offset if self.form == "state" else mixer.output_offset
            port.set(self.name, site)


class DirectionOffsets(nn.Module):
    """The offsets of one mixer's directions: `forward_offset`, `backward_offset`; of further ones `offset<suffix>`."""

    def __init__(self, zeros: Tensor, suffixes: tuple[str, ...]) -> None:
        super().__init__()
        self.names = [{"": "forward_offset", "_b": "backward_offset"}.get(s, f"offset{s}") for s in suffixes]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(zeros.clone()))

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.names)
