"""FacT: factor-tuning (arXiv 2212.03145), Tucker form: one small tensor decomposition for all weights together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, FunctionBranch
from mambapeft_vision.methods.checks import require_dropout, require_ported_linear, require_positive
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.targets import like, match_parameters, weight_port
from mambapeft_vision.utils.errors import UserError


class FacT(Method):
    """ΔW_k = s · V C_kᵀ U with C_k = Σ_t slots[t, k] · core[:, :, t]: every D x D part of every weight is a slot k.

    A weight [a·D, b·D] has a·b slots, e.g. qkv three, proj one, fc1 and fc2 four each: 12 in a block. U [r, D] starts
    as `nn.Linear` does, V [D, r] at zero, core [r, r, r] and slots [r, K] Xavier-uniform. It runs on activations.

    Args:
        rank: r.
        scale: s.
        dropout: before V.
        targets: roles or patterns of names of linear maps with a side port.
    """

    def __init__(
        self,
        *,
        rank: int,
        targets: str | list[str],
        scale: float = 1.0,
        dropout: float = 0.1,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        require_dropout(self, dropout)
        self.rank, self.targets, self.scale, self.dropout = rank, targets, scale, dropout
        self._branches: dict[str, FacTBranch] = {}

    def attach(self, model: Backbone) -> None:
        dim, slots = model.embed_dim, 0
        for parameter in match_parameters(model, self.targets, self.name):
            module, side = require_ported_linear(model, parameter, self.name)
            if module.out_features % dim or module.in_features % dim:
                raise UserError(
                    f"{self.name}: {parameter} is {module.out_features} x {module.in_features}; "
                    f"expected multiples of embed_dim={dim}"
                )
            branch = FacTBranch(self, slots, module.out_features // dim, module.in_features // dim)
            self._branches[parameter] = branch
            side.add(FunctionBranch(self.name, branch))
            slots += branch.outputs * branch.inputs
        new = like(model).new_empty
        self.u = nn.Parameter(new(self.rank, dim))
        self.v = nn.Parameter(torch.zeros_like(new(dim, self.rank)))
        self.core = nn.Parameter(new(self.rank, self.rank, self.rank))
        self.slots = nn.Parameter(new(self.rank, slots))
        nn.init.kaiming_uniform_(self.u, a=5**0.5)
        nn.init.xavier_uniform_(self.core)
        nn.init.xavier_uniform_(self.slots)

    def cores(self, first: int, count: int) -> Tensor:
        """C_k of `count` slots from `first` on, [count, r, r]."""
        return torch.einsum("ijt,tk->kij", self.core, self.slots[:, first : first + count])

    def to_weight_space(self, model: Backbone) -> None:
        for parameter, branch in self._branches.items():
            require_ported_linear(model, parameter, self.name)[1].remove(self.name)
            weight_port(model, parameter).add(self.name, branch.delta)


class FacTBranch:
    """One weight's part: its slots, `outputs` x `inputs` of them. It owns no tensors; the method does."""

    def __init__(self, method: FacT, first: int, outputs: int, inputs: int) -> None:
        self.method, self.first, self.outputs, self.inputs = method, first, outputs, inputs

    def _cores(self) -> Tensor:
        """[outputs, inputs, r, r]."""
        cores = self.method.cores(self.first, self.outputs * self.inputs)
        return cores.unflatten(0, (self.outputs, self.inputs))

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs · D] → [..., outputs · D]."""
        method = self.method
        low = F.linear(x.unflatten(-1, (self.inputs, -1)), method.u)
        middle = torch.einsum("...ni,onij->...oj", low, self._cores())
        middle = F.dropout(middle, method.dropout, method.training)
        return method.scale * F.linear(middle, method.v).flatten(-2)

    def delta(self, weight: Tensor) -> Tensor:
        """The same map as a weight [outputs · D, inputs · D]."""
        parts = torch.einsum("dj,onij,ie->odne", self.method.v, self._cores(), self.method.u)
        return self.method.scale * parts.reshape(weight.shape)
