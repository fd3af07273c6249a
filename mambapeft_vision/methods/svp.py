"""SVP: selective visual prompting (AAAI 2025, arXiv 2412.08947): a prompt for every patch token before every block."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, TokenLayout
from mambapeft_vision.methods.checks import require_dropout, require_positive, undecayed_biases
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.targets import like, one_width
from mambapeft_vision.methods.tokens import patch_mask
from mambapeft_vision.utils.errors import UserError


class SVP(Method):
    """x ← x + α_l ⊙ dropout(IP_l(x)) + β_g ⊙ dropout(CP_g(x)) for the patch tokens x that enter block l.

    IP_l(x) = silu(W2_l (W1_l x + b1_l) + b2_l), D → r → D, has weights of its own in every block. CP_g(x) =
    silu(W_g x + b_g), D → D, is shared by the blocks of group g = l // shared_layers. α_l and β_g [D] start at zero,
    the linear maps as `nn.Linear` does. Class and register tokens and other methods' prompts are left alone. On Vim x
    is what the mixer before added to the residual sum, which itself is not read. Biases have no weight decay.

    The published code gives token k behind the class token the cross prompt of token k in front of it, already
    prompted (`cross="first_half"`).

    Args:
        rank: r.
        shared_layers: blocks that share one cross prompt; the last group has the remaining blocks.
        cross: "own", each token's cross prompt is its own; or "first_half", as published.
        dropout: on either prompt.
        image_attention: images are first weighed by SimAM, an attention without parameters; see `simam`.
        head_hidden: H of a head of two linear maps D → H → classes with nothing between; None: the usual head.
        scale_rows: rows of α; None: one for each block. The published code has 24 whatever the depth.
    """

    merge_obstacle = "its prompts depend on the tokens; no weight holds them"

    def __init__(
        self,
        *,
        rank: int = 64,
        shared_layers: int = 8,
        cross: str = "own",
        dropout: float = 0.0,
        image_attention: bool = False,
        head_hidden: int | None = None,
        scale_rows: int | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        given = {"head_hidden": head_hidden, "scale_rows": scale_rows}
        require_positive(
            self, rank=rank, shared_layers=shared_layers, **{k: v for k, v in given.items() if v is not None}
        )
        require_dropout(self, dropout)
        if cross not in ("own", "first_half"):
            raise UserError(f"SVP: cross={cross!r}; expected 'own' or 'first_half'")
        self.rank, self.shared_layers, self.cross, self.dropout = rank, shared_layers, cross, dropout
        self.image_attention, self.head_hidden, self.scale_rows = image_attention, head_hidden, scale_rows

    @property
    def identity_at_init(self) -> bool:
        return not self.image_attention

    def attach(self, model: Backbone) -> None:
        if self.cross == "first_half":
            _middle(model.layout, self.name)
        depth, dim, tensor = len(model.blocks), one_width(model, self.name), like(model)
        rows = self.scale_rows or depth
        if rows < depth:
            raise UserError(f"{self.name}: scale_rows={rows}; expected at least one for each of {depth} blocks")
        groups = -(-depth // self.shared_layers)
        linear = partial(nn.Linear, device=tensor.device, dtype=tensor.dtype)
        self.inner_prompts = nn.ModuleList(
            nn.Sequential(linear(dim, self.rank), linear(self.rank, dim)) for _ in range(depth)
        )
        self.cross_prompts = nn.ModuleList(linear(dim, dim) for _ in range(groups))
        self.inner_scale = nn.Parameter(tensor.new_zeros(rows, dim))
        self.cross_scale = nn.Parameter(tensor.new_zeros(groups, dim))
        for i, block in enumerate(model.blocks):
            block.input.set(self.name, BlockPrompts(self, i))
        if self.image_attention:
            model.images.set(self.name, simam)
        if self.head_hidden is not None:
            model.head = _two_layers(model.head, self.head_hidden)

    def inner(self, block: int, x: Tensor) -> Tensor:
        """α ⊙ dropout(IP(x)) of a block."""
        prompts = F.silu(self.inner_prompts[block](x))
        return self.inner_scale[block] * F.dropout(prompts, self.dropout, self.training)

    def crossed(self, block: int, x: Tensor) -> Tensor:
        """β ⊙ dropout(CP(x)) of a block's group."""
        group = block // self.shared_layers
        prompts = F.silu(self.cross_prompts[group](x))
        return self.cross_scale[group] * F.dropout(prompts, self.dropout, self.training)

    def param_groups(self) -> list[dict[str, Any]]:
        return undecayed_biases(self)


class BlockPrompts:
    """The value of one block's input port."""

    def __init__(self, method: SVP, block: int) -> None:
        self.method, self.block = method, block

    def __call__(self, tokens: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if self.method.cross == "first_half":
            return self._as_published(tokens, _middle(layout, self.method.name)), layout
        prompts = self.method.inner(self.block, tokens) + self.method.crossed(self.block, tokens)
        return tokens + patch_mask(layout, tokens) * prompts, layout

    def _as_published(self, tokens: Tensor, middle: int) -> Tensor:
        method, block = self.method, self.block
        front, special, behind = tokens.split((middle, 1, middle), dim=1)
        front = front + method.inner(block, front) + method.crossed(block, front)
        behind = behind + method.inner(block, behind) + method.crossed(block, front)
        return torch.cat((front, special, behind), dim=1)


def simam(images: Tensor) -> Tensor:
    """SimAM (ICML 2021): x · sigmoid((x - m)² / (4 (v + 1e-3)) + 1/2), m and v of each image's channel [B, C, H, W].

    v is the sum of (x - m)² over H · W - 1.
    """
    squares = (images - images.mean((2, 3), keepdim=True)).square()
    variance = squares.sum((2, 3), keepdim=True) / (images[0, 0].numel() - 1)
    return images * torch.sigmoid(squares / (4 * (variance + 1e-3)) + 0.5)


def _middle(layout: TokenLayout, who: str) -> int:
    """The position of the one special token, with as many patches in front of it as behind."""
    if layout.prompts or len(layout.special) != 1 or layout.length != 2 * layout.special[0] + 1:
        raise UserError(
            f"{who}: cross='first_half' needs one class token with as many patches in front of it as behind it and no "
            f"other tokens; these tokens: {layout.length}, special {layout.special}, prompts {layout.prompts}. "
            f"Set cross: own"
        )
    return layout.special[0]


def _two_layers(head: nn.Module, hidden: int) -> nn.Sequential:
    """A head D → hidden → classes in the place of a linear one. The last map starts at zero, as all heads do."""
    assert isinstance(head, nn.Linear)
    linear = partial(nn.Linear, device=head.weight.device, dtype=head.weight.dtype)
    first, last = linear(head.in_features, hidden), linear(hidden, head.out_features)
    nn.init.trunc_normal_(first.weight, std=0.02)
    for tensor in (first.bias, last.weight, last.bias):
        nn.init.zeros_(tensor)
    return nn.Sequential(first, last)
