"""(IA)³: rescaled activations (arXiv 2205.05638)."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.method import site_key
from mambapeft_vision.methods.targets import match_parameters, owner_module, row_slice, weight_port
from mambapeft_vision.methods.weight_delta import WeightDelta
from mambapeft_vision.utils.errors import UserError


class IA3(WeightDelta):
    """y = l ⊙ (W x + bias), or y = W (l ⊙ x) + bias; l starts at one and has no weight decay.

    Both are computed as weights, diag(l) W or W diag(l), and as a scaled bias.

    Args:
        targets, rows: see `WeightDelta`.
        side: "outputs" or "inputs", whichever l scales. The paper scales the outputs of a layer, but the inputs of the
            second feed-forward map, which are activations too.
    """

    undecayed = ("scale",)

    def __init__(
        self,
        *,
        targets: str | list[str],
        side: str = "outputs",
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        if side not in ("outputs", "inputs"):
            raise UserError(f"IA3: side={side!r}; expected 'outputs' or 'inputs'")
        self.side = side

    def attach(self, model: Backbone) -> None:
        super().attach(model)
        if self.side == "inputs":
            return
        for parameter in match_parameters(model, self.targets, self.name):
            module, attribute = owner_module(model, parameter)
            if attribute == "weight" and isinstance(getattr(module, "bias", None), nn.Parameter):
                rows = row_slice(model, parameter, self.rows, self.name) or slice(None)
                bias = f"{parameter.removesuffix('weight')}bias"
                weight_port(model, bias).add(self.name, functools.partial(self._of_bias, parameter, rows))

    def _of_bias(self, parameter: str, rows: slice, bias: Tensor) -> Tensor:
        """The change of a bias [out], whose part `rows` is scaled."""
        change = torch.zeros_like(bias)
        change[rows] = (self.sites[site_key(parameter)]["scale"] - 1) * bias[rows]
        return change

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, out_features, in_features = weight.shape
        return {"scale": weight.new_ones(*groups, out_features if self.side == "outputs" else in_features)}

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return (own["scale"] - 1).unsqueeze(-1 if self.side == "outputs" else -2) * weight
