"""Prompt-tuning: learned tokens beside the image's, once, before the first block.

Visual prompt tuning (arXiv 2203.12119); on Vision Mamba: MambaPEFT (arXiv 2411.03855).
"""

from typing import Any

from torch import Tensor, nn

from mambapeft_vision.methods.method import Method, require_positive
from mambapeft_vision.methods.tokens import TokenGenerator, join, positions
from mambapeft_vision.utils.errors import UserError

POSITIONS = ("prefix_suffix", "prefix", "infix", "suffix")


class Prompt(Method):
    """n tokens of width D join after the position embedding and stay through all blocks.

    The class token's index moves with the tokens in front of it.

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

    def attach(self, model: nn.Module) -> None:
        width = model.embed_dim
        hidden = width if self.projection else None
        self.sites = TokenGenerator(self.tokens, width, width, hidden, "embedding", model.cls_token)
        model.prompt.set(self.name, self.join)

    def join(self, tokens: Tensor, class_index: int) -> tuple[Tensor, int]:
        """[B, L, D] and the class token's index → [B, L + n, D] and its new index."""
        at = positions(self.position, self.tokens, tokens.shape[1], class_index)
        return join(tokens, self.sites(), at), class_index + sum(place <= class_index for place in at)

    def fold(self) -> None:
        self.sites.fold()
        self.projection = False

    def param_groups(self) -> list[dict[str, Any]]:
        return self.sites.groups(self.lr_mult, self.decay_mult, self.bias_decay_mult)
