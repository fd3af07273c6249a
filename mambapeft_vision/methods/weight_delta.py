"""The base of methods that change single weights: W' = W + Δ(W), with tensors of their own for every weight."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.checks import require_matrix
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import (
    frozen_weight,
    group_count,
    match_parameters,
    row_slice,
    rows_of,
    weight_port,
)


class WeightDelta(Method):
    """A method is two functions: `start`, its tensors for a weight, and `delta`, the change that they make.

    Both see matrices [..., out, in]: the weight of a linear map [out, in], a convolution's with all its inputs in one
    axis, and a grouped weight as it is, [K, out, in]. So every tensor of a grouped weight has a first axis K, and every
    operation works on the last axes only.

    The delta is computed where the weight is read, once a pass. It costs operations in proportion to the weight, and
    not to the tokens that pass it, of which there are ten to a hundred times as many as the weight has rows or columns.
    Its gradient takes one product more than that of a frozen map, the gradient of the whole weight.

    Args:
        targets: roles (in_proj, out_proj, qkv, …) or patterns of parameter names.
        rows: a block of output rows that the backbone names: x, z of in_proj; d, b, c of x_proj.
    """

    #: Tensors without weight decay, since they rest at one: decay would pull the weights to zero.
    undecayed: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        targets: str | list[str],
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        self.targets, self.rows = targets, rows
        self.sites: Any = nn.ModuleDict()
        self._grouped: set[str] = set()

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The initial values of the tensors that train for one weight [..., out, in]. Raises UserError for a misfit."""
        raise NotImplementedError

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Δ for a weight [..., out, in] and its tensors, in the weight's shape."""
        raise NotImplementedError

    def share(self, weights: Mapping[str, Tensor]) -> None:
        """Makes tensors that several weights share, before any `start`. weights: all targets, by name."""

    def attach(self, model: Backbone) -> None:
        places = {}
        for parameter in match_parameters(model, self.targets, self.name):
            require_matrix(frozen_weight(model, parameter), parameter, self.name)
            places[parameter] = row_slice(model, parameter, self.rows, self.name)
            if group_count(model, parameter) is not None:
                self._grouped.add(parameter)
        weights = {
            parameter: self._matrix(parameter, rows_of(frozen_weight(model, parameter).detach(), rows))
            for parameter, rows in places.items()
        }
        if weights:
            self.share(weights)
        for parameter, rows in places.items():
            own = {name: nn.Parameter(value) for name, value in self.start(weights[parameter]).items()}
            self.sites[site_key(parameter)] = nn.ParameterDict(own)
            # In a deep copy of the model a partial is bound to the copy's method; a closure would be to this one.
            weight_port(model, parameter).add(self.name, functools.partial(self._of_weight, parameter), rows)

    def _matrix(self, parameter: str, weight: Tensor) -> Tensor:
        return weight if parameter in self._grouped else weight.flatten(1)

    def _of_weight(self, parameter: str, weight: Tensor) -> Tensor:
        """Δ in the shape that the weight has in the backbone."""
        return self.delta(self._matrix(parameter, weight), self.sites[site_key(parameter)]).view_as(weight)

    def param_groups(self) -> list[dict[str, Any]]:
        groups = []
        for decays, decay_mult in ((True, self.decay_mult), (False, 0.0)):
            tensors = [
                p for own in self.sites.values() for name, p in own.items() if (name not in self.undecayed) == decays
            ]
            groups.append({"params": tensors, "lr_mult": self.lr_mult, "decay_mult": decay_mult})
        return groups


def uniform(weight: Tensor, *shape: int) -> Tensor:
    """A tensor [*shape] like `weight`, drawn as `nn.Linear` draws weights of that many inputs as the last axis has."""
    bound = shape[-1] ** -0.5
    return weight.new_empty(shape).uniform_(-bound, bound)


def divisor_up_to(limit: int, *sizes: int) -> int:
    """The largest whole number up to `limit` that divides all `sizes`."""
    return next(d for d in range(min(limit, *sizes), 0, -1) if all(size % d == 0 for size in sizes))
