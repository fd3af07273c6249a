"""VPT-deep: visual prompt tuning with tokens of their own in every block (ECCV 2022, arXiv 2203.12119)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, TokenLayout
from mambapeft_vision.methods.checks import require_dropout, require_positive
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.prompt import POSITIONS
from mambapeft_vision.methods.targets import frozen_weight, role
from mambapeft_vision.methods.tokens import join, position_tensor
from mambapeft_vision.utils.errors import UserError


class VPTDeep(Method):
    """n tokens [n, D] join in front of the first block; before every later block others take their place.

    The block's outputs at their positions are dropped, so they act only through the other tokens of that block. Tokens
    start uniform in ± sqrt(6 / (C · p² + D)), for patches of p × p pixels with C channels.

    Args:
        tokens: n.
        position: where they join; see `Prompt`.
        dropout: on their entries.
    """

    identity_at_init = False
    merge_obstacle = "its tokens join the sequence; no weight holds them"

    def __init__(
        self,
        *,
        tokens: int,
        position: str = "prefix_suffix",
        dropout: float = 0.1,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, tokens=tokens)
        require_dropout(self, dropout)
        if position not in POSITIONS:
            raise UserError(f"VPTDeep: position={position!r}; expected one of {', '.join(POSITIONS)}")
        self.tokens, self.position, self.dropout = tokens, position, dropout
        self.sites = nn.ParameterDict()

    def attach(self, model: Backbone) -> None:
        patch = frozen_weight(model, role(model, "patch_embed", self.name)[0])
        bound = math.sqrt(6 / (patch[0].numel() + model.embed_dim))
        model.prompt.set(self.name, self.join)
        for block in model.blocks:
            table = nn.Parameter(patch.new_empty(self.tokens, model.embed_dim).uniform_(-bound, bound))
            self.sites[site_key(block.name)] = table
            block.replace.set(self.name, BlockTokens(self, site_key(block.name)))

    def join(self, tokens: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        """[B, L, D] → [B, L + n, D]: zeros, which the first block replaces."""
        places = layout.places(self.position, self.tokens)
        return join(tokens, tokens.new_zeros(self.tokens, tokens.shape[-1]), places), layout.joined(places)


class BlockTokens:
    """The value of one block's port `replace`."""

    def __init__(self, method: VPTDeep, key: str) -> None:
        self.method, self.key = method, key

    def __call__(self, tokens: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        method = self.method
        if len(layout.prompts) != method.tokens:
            raise UserError(
                f"{method.name} replaces its {method.tokens} tokens before every block, but there are "
                f"{len(layout.prompts)} prompts; remove the other method that joins tokens"
            )
        new = method.sites[self.key].expand(len(tokens), -1, -1)
        new = F.dropout(new, method.dropout, method.training)
        return position_tensor(layout.prompts, tokens.device), new
