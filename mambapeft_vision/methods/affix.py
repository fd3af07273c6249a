"""Affix-tuning: learned tokens beside the image's in every mixer (MambaPEFT, arXiv 2411.03855)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_vision.backbones.contract import Backbone, Joined, Mixer, PrefixPort, TokenLayout
from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.targets import like, mixers_of
from mambapeft_vision.methods.tokens import TokenGenerator, fill_ends, join, kept
from mambapeft_vision.utils.errors import UserError

# Position → how `TokenLayout.places` calls it.
POSITIONS = {"prefix": "prefix", "infix": "infix", "around_class": "around_special", "suffix": "suffix"}


class Affix(Method):
    """n tokens for each layer (and direction) join the sequence before the scan; their outputs are dropped after it.

    Where each direction has a sequence of its own (VMamba), tokens have width E and join in front of it, after the
    convolution. Elsewhere inner tokens have width 2E (x and gate z) and join in_proj's output, so they pass conv1d,
    x_proj, scan and gate. The gate half only gates outputs that are dropped: it is dead, and `lean` leaves it out.
    Outer tokens have width D and join in_proj's input.

    prefix: inner dual: each direction reads its own tokens first. One buffer, [P_f | tokens | reversed P_b], serves
        both directions: each meets the other's tokens last, where a causal scan no longer sees them. inner single:
        the same with P_b = P_f. outer dual: [P_1 | hidden | P_2]. outer single: [P | hidden], which reaches
        the forward scan only.
    infix: spread evenly, as torch.tensor_split divides the tokens. single: one buffer. dual: the backward direction
        splits the reversed tokens and has its own, in a second buffer.
    around_class: half right before and half right after the class token (one, no registers). dual: as for infix.
    suffix: [tokens | S], single only; it reaches the backward scan only (the forward one has passed already).

    Args:
        tokens: n.
        position: one of the above.
        directions: "dual" (own tokens for each direction, two or four) or "single" (shared).
        inner: whether tokens join after in_proj or before it.
        projection: tokens come from embedding → Linear → Tanh → Linear, which folds into a table after training.
        hidden: width of the projection's hidden layer; default: the tokens' width (2E or D).
        lean: inner only: tokens of width E without the dead gate half.
        bias_decay_mult: factor on the weight decay of the projection's biases.
    """

    identity_at_init = False
    merge_obstacle = "its tokens join the sequence; no weight holds them"

    def __init__(
        self,
        *,
        tokens: int,
        position: str = "prefix",
        directions: str = "dual",
        inner: bool = True,
        projection: bool = False,
        hidden: int | None = None,
        lean: bool = False,
        bias_decay_mult: float = 0.0,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, tokens=tokens, **({} if hidden is None else {"hidden": hidden}))
        if position not in POSITIONS:
            raise UserError(f"Affix: position={position!r}; expected one of {', '.join(POSITIONS)}")
        if directions not in ("single", "dual"):
            raise UserError(f"Affix: directions={directions!r}; expected 'single' or 'dual'")
        if position == "suffix" and directions == "dual":
            raise UserError("Affix: no scan sees a suffix of its own; use position: suffix with directions: single")
        if hidden is not None and not projection:
            raise UserError(f"Affix: hidden={hidden} is the projection's size; set projection: true or leave it out")
        if lean and not inner:
            raise UserError("Affix: lean leaves out the gate half of inner tokens; set inner: true or lean: false")
        self.tokens, self.position, self.directions, self.inner = tokens, position, directions, inner
        self.projection, self.hidden, self.lean, self.bias_decay_mult = projection, hidden, lean, bias_decay_mult
        self._table: tuple[Tensor, ...] | None = None  # every layer's tokens, during a forward

    def attach(self, model: Backbone) -> None:
        mixers = mixers_of(model, self.name)
        model.layout.places(POSITIONS[self.position], self.tokens)  # refuses what this backbone has no place for
        widths = [self._width(model, mixer) for mixer in mixers]
        directions = len(mixers[0].suffixes)
        self._per_layer = directions if self.directions == "dual" else 1
        self._columns = [self._per_layer * width for width in widths]
        distinct = set(widths)  # stages may differ
        hidden = (self.hidden or max(distinct)) if self.projection else None
        mean = sum(distinct) // len(distinct)
        self.sites = TokenGenerator(self.tokens, mean, sum(self._columns), hidden, "table", like(model))
        ends = (self.tokens, self.tokens) if self.inner and self.position == "prefix" else None
        for i, mixer in enumerate(mixers):
            if isinstance(mixer.affix, PrefixPort):
                mixer.affix.set(self.name, partial(self._prefixes, i, directions))
            else:
                mixer.affix.set(self.name, LayerAffix(self, i, directions // 2), inner=self.inner, ends=ends)

    def _width(self, model: Backbone, mixer: Mixer) -> int:
        """The width of one token. Raises UserError if the mixer has no place for such tokens."""
        if isinstance(mixer.affix, PrefixPort):
            if not self.inner or self.position != "prefix":
                raise UserError(
                    f"{self.name}: position={self.position!r}, inner={self.inner}, but {type(model).__name__} takes "
                    f"tokens in front of each direction's sequence alone; use position: prefix with inner: true"
                )
            return mixer.d_inner
        if not self.inner:
            return model.embed_dim
        return mixer.d_inner * (1 if self.lean else 2)

    def _prefixes(self, layer: int, directions: int) -> Tensor:
        """[K, n, E] in front of each direction's sequence."""
        return self.layer_tokens(layer).transpose(0, 1).expand(directions, -1, -1)

    def layer_tokens(self, layer: int, first: bool = True, last: bool = True) -> Tensor:
        """[n, per layer, width] of one layer. All layers' are generated at once, at layer 0.

        first, last: whether this is the layer's first and last call of a forward.
        """
        if self._table is None or (layer == 0 and first):  # None: a block that is recomputed for its gradient
            self._table = self.sites().split(self._columns, dim=1)
        assert self._table is not None
        tokens = self._table[layer].unflatten(1, (self._per_layer, -1))
        if layer == len(self._columns) - 1 and last:
            self._table = None  # holds the graph of this forward
        return tokens

    def fold(self) -> None:
        self.sites.fold()
        self.projection, self.hidden = False, None

    def param_groups(self) -> list[dict[str, Any]]:
        return self.sites.groups(self.lr_mult, self.decay_mult, self.bias_decay_mult)


class LayerAffix:
    """The value of one mixer's affix port: [B, L, C] → the buffers that one pair of directions reads.

    pair: 0, the tokens as they stand; 1 (a mixer with four directions), the same in another order of the patches.
    """

    def __init__(self, method: Affix, layer: int, pairs: int) -> None:
        self.method, self.layer, self.pairs = method, layer, pairs

    def __call__(self, tokens: Tensor, layout: TokenLayout, has_room: bool = False, pair: int = 0) -> Joined:
        method = self.method
        new = method.layer_tokens(self.layer, first=pair == 0, last=pair == self.pairs - 1)
        if method.directions == "dual":
            new = new[:, 2 * pair : 2 * pair + 2]
        if new.shape[-1] != tokens.shape[-1]:  # lean: the gate half is zero
            new = F.pad(new, (0, tokens.shape[-1] - new.shape[-1]))
        own = new.unbind(1)
        if has_room:
            new, at = self._both_ends(own, layout.length)
            filled = fill_ends(tokens, new, method.tokens)
            return Joined((filled,), (kept(at, layout.length, tokens.device),))
        if method.position == "prefix":
            return _joined(tokens, [self._both_ends(own, layout.length)])
        kind = POSITIONS[method.position]
        buffers = [(own[0], layout.places(kind, method.tokens))]
        if len(own) == 2:
            reading = layout.mirrored().places(kind, method.tokens)
            buffers.append((own[1].flip(0), [layout.length - place for place in reversed(reading)]))
        return _joined(tokens, buffers)

    def _both_ends(self, own: tuple[Tensor, ...], length: int) -> tuple[Tensor, list[int]]:
        """The prefix of the forward direction in front, and that of the backward direction, as it reads it, behind."""
        n = self.method.tokens
        if not self.method.inner:
            return torch.cat(own), [0] * n + [length] * (n * (len(own) - 1))
        return torch.cat((own[0], own[-1].flip(0))), [0] * n + [length] * n


def _joined(tokens: Tensor, buffers: list[tuple[Tensor, list[int]]]) -> Joined:
    length = tokens.shape[1]
    return Joined(
        tuple(join(tokens, new, at) for new, at in buffers),
        tuple(kept(at, length, tokens.device) for _, at in buffers),
    )
