"""LST: ladder side tuning (NeurIPS 2022, arXiv 2206.06522): a small network beside a frozen trunk."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, TokenLayout, attention
from mambapeft_vision.methods.checks import require_positive, undecayed_biases
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import like, one_width
from mambapeft_vision.utils.errors import UserError


class LST(Method):
    """feature ← feature + up(norm(z)), z the state of a side network that reads the trunk's blocks from first to last:

        z ← rung_l(μ_l · down_l(h_l) + (1 - μ_l) · z),  μ_l = sigmoid(a_l / 0.1),  a_l = 0 at first.

    h_l is the output of block l. No gradient goes back into it, so a trunk in which nothing else trains keeps no
    activations. z has D / reduction channels and starts as down_0(h_0). Every rung is a transformer block of this width
    (published: a small copy of the trunk's block, with weights pruned from it). up starts at zero.

    Args:
        reduction: D over the channels of the side network.
        mlp_ratio: MLP ratio of the rungs.
    """

    merge_obstacle = "the side network is no function of the trunk's weights"

    def __init__(
        self, *, reduction: int = 8, mlp_ratio: int = 2, lr_mult: float = 1.0, decay_mult: float = 1.0
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, reduction=reduction, mlp_ratio=mlp_ratio)
        self.reduction, self.mlp_ratio = reduction, mlp_ratio
        self.sites = nn.ModuleDict()
        self._state: tuple[Tensor, TokenLayout] | None = None  # z and its layout, during a forward

    def attach(self, model: Backbone) -> None:
        width = one_width(model, self.name) // self.reduction
        if width < 1:
            raise UserError(f"{self.name}: reduction={self.reduction}; expected at most {model.embed_dim}, the width")
        tensor, readout = like(model), model.layout.readout
        make: dict[str, Any] = {"device": tensor.device, "dtype": tensor.dtype}
        for i, block in enumerate(model.blocks):
            self.sites[site_key(block.name)] = Rung(model.embed_dim, width, self.mlp_ratio, gate=i > 0, make=make)
            block.tap.add(self.name, partial(self.climb, site_key(block.name), model))
        read = width * (1 if readout == "mean" else len(readout))
        self.norm = nn.LayerNorm(width, **make)
        self.up = nn.Linear(read, model.head_hidden_size, **make)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        model.feature.set(self.name, self.add)

    def climb(self, key: str, model: Backbone, tokens: Tensor, layout: TokenLayout) -> None:
        """The next rung, with the output [B, L, D] of its block."""
        if self.training and getattr(model, "grad_checkpointing", False):
            raise UserError(
                f"{self.name}: gradient checkpointing runs blocks twice, and with them the side network. The trunk "
                f"beside it keeps no activations anyway; call set_grad_checkpointing(False)"
            )
        rung: Any = self.sites[key]
        if rung.gate is not None and self._state is None:
            raise UserError(f"{self.name}: its first block did not run; call the whole model")
        z = None if rung.gate is None or self._state is None else self._state[0]
        self._state = rung(tokens, z), layout

    def add(self, feature: Tensor) -> Tensor:
        """The feature [B, head_hidden_size] plus up(norm(z))."""
        if self._state is None:
            raise UserError(
                f"{self.name}: forward_head needs the side network's state, which forward_features leaves for one "
                f"call; call the model, or forward_features right before"
            )
        z, layout = self._state
        self._state = None  # holds the graph of this forward
        return feature + self.up(layout.read(self.norm(z)).flatten(1))

    def param_groups(self) -> list[dict[str, Any]]:
        return undecayed_biases(self)


class Rung(nn.Module):
    """One step of the side network: takes in a block's output, then attention and MLP, each with a residual."""

    gate: nn.Parameter | None

    def __init__(self, embed_dim: int, width: int, mlp_ratio: int, gate: bool, make: dict[str, Any]) -> None:
        super().__init__()
        self.down = nn.Linear(embed_dim, width, **make)
        self.register_parameter("gate", nn.Parameter(torch.zeros(1, **make)) if gate else None)
        self.norm1, self.norm2 = nn.LayerNorm(width, **make), nn.LayerNorm(width, **make)
        self.qkv, self.proj = nn.Linear(width, 3 * width, **make), nn.Linear(width, width, **make)
        self.fc1, self.fc2 = nn.Linear(width, mlp_ratio * width, **make), nn.Linear(mlp_ratio * width, width, **make)

    def forward(self, tokens: Tensor, z: Tensor | None) -> Tensor:
        """tokens [B, L, D] of the trunk, z [B, L, d] of the rung before → [B, L, d]."""
        entering = self.down(tokens)
        if z is not None and self.gate is not None:
            entering = torch.lerp(z, entering, torch.sigmoid(self.gate / 0.1).to(z.dtype))
        z = entering
        q, k, v = self.qkv(self.norm1(z)).unsqueeze(1).chunk(3, dim=-1)  # one head
        z = z + self.proj(attention(q, k, v).squeeze(1))
        return z + self.fc2(F.gelu(self.fc1(self.norm2(z))))
