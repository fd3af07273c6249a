"""Training the backbone's own tensors: full fine-tuning, from scratch, BitFit, norm tuning."""

from typing import Any

from torch import nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.targets import match_parameters
from mambapeft_vision.utils.errors import UserError


class Unfreeze(Method):
    """Trains the named tensors of the backbone themselves.

    Weight decay is 0 on tensors of one dimension (norms, biases, D) and on those in `no_decay`, as in the
    published recipe; `decay_mult` applies to the others.

    Args:
        targets: roles (norm, …) or patterns of parameter names; "**" is everything.
        no_decay: roles or patterns of further tensors without weight decay (those that the backbone has).
        reinitialise: start from random weights ("scratch") instead of the pretrained ones; needs targets "**", as
            only what is owned is saved.
        flat_decay_mult: decay multiplier of the one-dimensional tensors.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        no_decay: list[str] | None = None,
        reinitialise: bool = False,
        flat_decay_mult: float = 0.0,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        self.targets, self.no_decay, self.reinitialise = targets, no_decay, reinitialise
        self.flat_decay_mult = flat_decay_mult
        self._owned: dict[str, nn.Parameter] = {}
        self._undecayed: set[str] = set()

    @property
    def identity_at_init(self) -> bool:
        return not self.reinitialise

    @property
    def attach_order(self) -> int:
        return -1 if self.reinitialise else 0  # before what starts from the weights, as DoRA does

    def attach(self, model: Backbone) -> None:
        parameters = dict(model.named_parameters())
        names = match_parameters(model, self.targets, self.name)
        if self.reinitialise:
            self._require_everything(names, parameters)
            model.init_weights()
        for name in names:
            parameters[name].requires_grad_(True)
            self._owned[name] = parameters[name]
        if self.no_decay:
            self._undecayed = set(match_parameters(model, self.no_decay, self.name, each=False))

    def _require_everything(self, names: list[str], parameters: dict[str, nn.Parameter]) -> None:
        """Raises UserError if tensors would be drawn anew but not saved: the adapter could not be loaded again."""
        others = [name for name in parameters if name not in names and not name.startswith("head.")]
        if others:
            raise UserError(
                f"{self.name}: reinitialise draws all weights anew, but targets={self.targets!r} leaves out "
                f'{len(others)} of them ({others[0]}, …); set targets: "**" or reinitialise: false'
            )

    def owned(self) -> dict[str, nn.Parameter]:
        return self._owned

    def param_groups(self) -> list[dict[str, Any]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, p in self._owned.items():
            flat = self.flat_decay_mult if p.ndim == 1 else self.decay_mult
            groups.setdefault(0.0 if name in self._undecayed else flat, []).append(p)
        return [{"params": ps, "lr_mult": self.lr_mult, "decay_mult": mult} for mult, ps in groups.items()]
