"""The layout of a backbone's sequence of tokens, and how it changes when prompts join."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mambapeft_vision.utils.errors import UserError

#: Where prompts can join; see `TokenLayout.places`.
PLACES = ("prefix", "suffix", "prefix_suffix", "infix", "around_special")


@dataclass(frozen=True)
class TokenLayout:
    """The layout of a sequence of tokens [B, length, D]. Positions count from 0.

    Attributes:
        length: tokens in all.
        grid: rows and columns of the image's patches, which stand in the sequence row by row.
        special: positions of tokens that are no patches (class tokens, registers): any number, anywhere, or none.
        readout: positions of the tokens that leave the network, or "mean": the mean over the patches.
        prompts: positions of learned tokens that joined.
    """

    length: int
    grid: tuple[int, int]
    special: tuple[int, ...] = ()
    readout: tuple[int, ...] | Literal["mean"] = "mean"
    prompts: tuple[int, ...] = ()

    @property
    def patches(self) -> tuple[int, ...]:
        """Positions of the image's patches."""
        others = {*self.special, *self.prompts}
        return tuple(i for i in range(self.length) if i not in others)

    def places(self, kind: str, n: int) -> list[int]:
        """Where n tokens join: for each, the number of present tokens in front of it; never decreasing.

        prefix, suffix: all at one end. prefix_suffix: half at each end. infix: between n + 1 equal parts.
        around_special: half right before and half right after the special token.
        Halves and parts are those of `torch.tensor_split`, but an odd token stands behind a special token.
        Raises: UserError for another kind, and for around_special where there is not one special token.
        """
        if kind == "prefix":
            return [0] * n
        if kind == "suffix":
            return [self.length] * n
        if kind == "prefix_suffix":
            return [0] * (n - n // 2) + [self.length] * (n // 2)
        if kind == "infix":
            size, longer = divmod(self.length, n + 1)
            return [i * size + min(i, longer) for i in range(1, n + 1)]
        if kind == "around_special":
            return self._around_special(n)
        raise UserError(f"position={kind!r} is unknown; expected one of {', '.join(PLACES)}")

    def _around_special(self, n: int) -> list[int]:
        if len(self.special) != 1:
            raise UserError(
                f"a position around the class token needs one such token, but this backbone has {len(self.special)} "
                f"special tokens; choose prefix, infix or suffix"
            )
        (position,) = self.special
        return [position] * (n // 2) + [position + 1] * (n - n // 2)

    def joined(self, places: Sequence[int]) -> "TokenLayout":
        """The layout once prompts have joined at `places`, which are in order."""

        def moved(position: int) -> int:
            return position + sum(place <= position for place in places)

        return replace(
            self,
            length=self.length + len(places),
            special=tuple(map(moved, self.special)),
            readout=self.readout if self.readout == "mean" else tuple(map(moved, self.readout)),
            prompts=tuple(sorted((*map(moved, self.prompts), *(place + i for i, place in enumerate(places))))),
        )

    @torch.no_grad()
    def through(
        self, functions: "Iterable[Callable[[Tensor, TokenLayout], tuple[Tensor, TokenLayout]]]", like: Tensor
    ) -> "TokenLayout":
        """The layout that functions of tokens and layout leave, one after another; found without any image.

        like: a tensor [..., D] on the tokens' device.
        """
        tokens, layout = like.new_empty(0, self.length, like.shape[-1]), self
        for function in functions:
            tokens, layout = function(tokens, layout)
        return layout

    def mirrored(self) -> "TokenLayout":
        """The layout of the same tokens read from last to first."""

        def mirror(positions: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted(self.length - 1 - position for position in positions))

        readout = self.readout if self.readout == "mean" else mirror(self.readout)
        return replace(self, special=mirror(self.special), readout=readout, prompts=mirror(self.prompts))

    def read(self, tokens: Tensor) -> Tensor:
        """[B, length, D] → the tokens that are read out [B, n, D], or the mean over the patches [B, 1, D].

        Raises: UserError where the tokens are not of this layout.
        """
        if tokens.ndim != 3 or tokens.shape[1] != self.length:
            raise UserError(
                f"tokens to read out have shape {tuple(tokens.shape)}; expected [B, {self.length}, D]: all tokens that "
                f"forward_features returns"
            )
        if self.readout != "mean":
            return select(tokens, self.readout)
        return select(tokens, self.patches).mean(1, keepdim=True)


def select(tokens: Tensor, positions: Sequence[int]) -> Tensor:
    """[B, L, D] → [B, len(positions), D] at increasing positions; a view where they stand together.

    One split and one concatenation, so that the gradient is one concatenation too: slices would each make one of the
    whole size, and indexing would need an index tensor and atomic additions.
    """
    runs = _runs(positions)
    bounds = [0, *(bound for run in runs for bound in run), tokens.shape[1]]
    pieces = tokens.split([stop - start for start, stop in pairwise(bounds)], dim=1)
    chosen = pieces[1::2]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Increasing positions as ranges [start, stop)."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = runs[-1][0], position + 1
        else:
            runs.append((position, position + 1))
    return runs
