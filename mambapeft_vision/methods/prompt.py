"""Prompt-tuning: learned tokens beside the image's, once, before the first block.

Visual prompt tuning (arXiv 2203.12119); on Vision Mamba: MambaPEFT (arXiv 2411.03855).
"""

from typing import Any

from torch import Tensor

from mambapeft_vision.backbones.contract import Backbone, TokenLayout
from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.targets import like
from mambapeft_vision.methods.tokens import TokenGenerator, join
from mambapeft_vision.utils.errors import UserError

POSITIONS = ("prefix_suffix", "prefix", "infix", "suffix")


class Prompt(Method):
    """n tokens of width D join after the position embedding and stay through all blocks.

    Special tokens (and what is read out) move with the tokens in front of them.

    Args:
        tokens: n.
        position: prefix_suffix (half at each end), prefix, suffix, or infix (spread evenly, as torch.tensor_split
            divides the tokens).
        projection: tokens come from embedding → Linear → Tanh → Linear (D-D-D), which folds into a table after
            training.
        bias_decay_mult: factor on the weight decay of the projection's biases.
    """

    identity_at_init = False
    merge_obstacle = "its tokens join the sequence; no weight holds them"

    def __init__(
        self,
        *,
        tokens: int,
        position: str = "prefix_suffix",
        projection: bool = False,
        bias_decay_mult: float = 0.0,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, tokens=tokens)
        if position not in POSITIONS:
            raise UserError(f"Prompt: position={position!r}; expected one of {', '.join(POSITIONS)}")
        self.tokens, self.position, self.projection = tokens, position, projection
        self.bias_decay_mult = bias_decay_mult

    def attach(self, model: Backbone) -> None:
        width = model.embed_dim
        hidden = width if self.projection else None
        self.sites = TokenGenerator(self.tokens, width, width, hidden, "embedding", like(model))
        model.prompt.set(self.name, self.join)

    def join(self, tokens: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        """[B, L, D] → [B, L + n, D], and the new layout."""
        places = layout.places(self.position, self.tokens)
        return join(tokens, self.sites(), places), layout.joined(places)

    def fold(self) -> None:
        self.sites.fold()
        self.projection = False

    def param_groups(self) -> list[dict[str, Any]]:
        return self.sites.groups(self.lr_mult, self.decay_mult, self.bias_decay_mult)
