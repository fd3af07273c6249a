"""The base class of PEFT methods.

A method is one file with a subclass of `Method` and one yaml. It owns its tensors: what is trained, saved, loaded,
decayed and merged follows from ownership, never from the names of parameters. It takes part in a backbone through
the ports of weights and of activations (`backbones/contract.py`), and finds them by roles (`targets.py`).
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.utils.errors import UserError


class Method(nn.Module):
    """Base of all PEFT methods.

    Constructor arguments are keyword-only and kept as attributes of the same name (so `config()` can record them).
    A subclass implements `attach` and, where its tensors do not all share one multiplier, `param_groups`.

    Args:
        lr_mult: factor on the learning rate of this method's tensors.
        decay_mult: factor on their weight decay.

    Example:
        >>> class FeatureOffset(Method):  # adds a trained vector to what the head gets
        ...     merge_obstacle = "no weight holds the offset"
        ...     def attach(self, model):
        ...         self.offset = nn.Parameter(torch.zeros(model.head_hidden_size))
        ...         model.feature.set(self.name, lambda feature: feature + self.offset)
        >>> model = adapt(create_backbone("vim_nano_patch8_64"), {"offset": FeatureOffset()}, num_classes=10)
        >>> model.counts()["by_method"]
        {'offset': 192}
    """

    #: Why this method cannot be folded into the backbone's weights; None: it can.
    merge_obstacle: str | None = None
    #: Optimiser steps after which `finish_warmup` is due; 0: the method has one phase.
    warmup_steps: int = 0

    def __init__(self, *, lr_mult: float = 1.0, decay_mult: float = 1.0) -> None:
        super().__init__()
        for name, value in (("lr_mult", lr_mult), ("decay_mult", decay_mult)):
            if not value >= 0:
                raise UserError(f"{type(self).__name__}: {name}={value!r}; expected a number >= 0")
        self.lr_mult, self.decay_mult = lr_mult, decay_mult
        self.name = type(self).__name__  # replaced by the key in `method:` when adapted

    @property
    def identity_at_init(self) -> bool:
        """Whether the adapted model equals the base model before the first step."""
        return True

    @property
    def attach_order(self) -> int:
        """Methods attach in this order, then by name: -1 draws the backbone's weights anew; 0 most; 1 changes shapes;
        2 needs to see the final shapes.
        """
        return 0

    def attach(self, model: Backbone) -> None:
        """Creates this method's tensors and connects them to the ports and weights of `model`.

        Called once, under a random state that depends only on the run's seed and this method's name.

        Example: every target gets an offset that starts at zero.
            for parameter in match_parameters(model, self.targets, self.name):
                offset = Delta(frozen_weight(model, parameter))
                self.sites[site_key(parameter)] = offset
                weight_port(model, parameter).add(self.name, offset)
        """
        raise NotImplementedError(f"{type(self).__name__} must implement attach(model)")

    def owned(self) -> dict[str, nn.Parameter]:
        """The tensors this method trains, by the names they are saved under."""
        return {plain_name(name): p for name, p in self.named_parameters()}

    def saved(self) -> dict[str, Tensor]:
        """The tensors that make up this method's saved state: what it owns and its persistent buffers."""
        own = self.owned()
        buffers = {plain_name(n): b for n, b in self.state_dict(keep_vars=True).items()}
        return {**{n: b for n, b in buffers.items() if not isinstance(b, nn.Parameter)}, **own}

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of owned tensors: dicts with params, lr_mult and decay_mult."""
        return [{"params": list(self.owned().values()), "lr_mult": self.lr_mult, "decay_mult": self.decay_mult}]

    def to_weight_space(self, model: Backbone) -> None:
        """Replaces branches on activations of `model` by equal deltas of weights, the first step of a merge."""

    def fold(self) -> None:
        """Simplifies a method that stays attached in a merged model, without changing what it computes."""

    @property
    def warming_up(self) -> bool:
        """Whether the warm-up phase is still to be finished; follows from `saved()`, so it survives a restart."""
        return False

    def finish_warmup(self) -> str:
        """Ends the warm-up phase. From now on other tensors are owned, so the optimiser must be built again.

        The training loop calls it once, after `warmup_steps` optimiser steps, while `warming_up`, and starts the new
        optimiser without the old one's state.
        Returns: one line for the log, saying what was chosen.
        """
        raise NotImplementedError(f"{type(self).__name__} has no warm-up phase (warmup_steps is 0)")

    def index_limits(self) -> dict[str, int]:
        """For saved tensors that hold indices: saved name → the number of entries that they index."""
        return {}

    def enter_phase_of(self, saved: Mapping[str, Tensor]) -> None:
        """Takes the phase in which `saved` (this method's tensors by their saved names) was saved, to load it next."""

    def config(self) -> dict[str, Any]:
        """`_target_` and the constructor's arguments: JSON-safe, and enough to build this method again."""
        names: set[str] = set()
        for cls in type(self).__mro__:
            if "__init__" not in vars(cls):
                continue
            parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
            names |= {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
                break  # takes nothing that it does not name
        arguments = {name: _plain(getattr(self, name)) for name in sorted(names)}
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **arguments}

    def describe(self) -> list[dict[str, Any]]:
        """The sites of this method, for the table that `dry_run=true` prints: one row for each owned tensor."""
        mults = {id(p): (g["lr_mult"], g["decay_mult"]) for g in self.param_groups() for p in g["params"]}
        return [
            {"site": name, "shape": tuple(p.shape), "lr_mult": mults[id(p)][0], "decay_mult": mults[id(p)][1]}
            for name, p in self.owned().items()
        ]


def site_key(name: str) -> str:
    """A parameter name as a key of `nn.ModuleDict` / `nn.ParameterDict`, which do not allow dots."""
    return name.replace(".", "/")


def plain_name(name: str) -> str:
    """The name a tensor is saved under: sites in plain dots, without the container's own name."""
    return name.removeprefix("sites.").replace("/", ".")


def _plain(value: Any) -> Any:
    """Containers as the types JSON gives back."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
