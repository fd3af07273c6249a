"""Ports: the named places of a backbone where something outside it may take part in the computation.

A port is empty by default and costs nothing then. The backbone defines where ports are and what passes through
them; it does not know who uses them. Every user of a port gives its name, so that conflicts can be reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mambapeft_kernels.low_rank.linear import LowRankBranch, add_low_rank, compute_dtype, low_rank_linear
from torch import Tensor, nn

from mambapeft_vision.utils.errors import UserError


class Port:
    """A place for one owner. `value` is what the owner put there, or None."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner: str | None = None
        self.value: Any = None

    def set(self, owner: str, value: Any) -> None:
        if self.owner is not None:
            raise UserError(
                f"port {self.name!r} takes one method, but both {self.owner!r} and {owner!r} want it; "
                f"remove one of them from method=[...]"
            )
        self.owner, self.value = owner, value

    def clear(self) -> None:
        self.owner = self.value = None


@dataclass(frozen=True)
class Branch:
    """One owner's function of the module's input, added to (some features of) its output."""

    owner: str
    fn: Callable[[Tensor], Tensor]
    rows: slice | None  # output features it writes to; None: all


class SidePort:
    """A place for any number of branches that run beside a linear map; their outputs are added to its output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.branches: list[Branch] = []

    def add(self, owner: str, fn: Callable[[Tensor], Tensor], rows: slice | None = None) -> None:
        self.branches.append(Branch(owner, fn, rows))

    def remove(self, owner: str) -> None:
        self.branches = [b for b in self.branches if b.owner != owner]

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        for branch in self.branches:
            out = _add_branch(branch, x, out)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear(x, weight, bias) and all branches.

        Functions with an attribute `low_rank` (down, up, scale, dropout) join products: those of one rate of dropout
        each other, and the first such group this one. One with a function `before` of x joins by itself.
        """
        groups: dict[float, list[LowRankBranch]] = {}
        apart, others = [], []
        for branch in self.branches:
            factors = getattr(branch.fn, "low_rank", None)
            if factors is None:
                others.append(branch)
                continue
            low_rank = LowRankBranch(*factors, branch.rows)
            if hasattr(branch.fn, "before"):
                apart.append((branch.fn.before(x), low_rank))
            else:
                groups.setdefault(low_rank.dropout, []).append(low_rank)
        first, *more = groups.values() if groups else [None]
        out = F.linear(x, weight, bias) if first is None else low_rank_linear(x, weight, bias, first)
        for inputs, joined in [*((x, group) for group in more), *((inputs, [one]) for inputs, one in apart)]:
            out = add_low_rank(out, inputs, joined)
        for branch in others:
            out = _add_branch(branch, x, out)
        return out


def _add_branch(branch: Branch, x: Tensor, out: Tensor) -> Tensor:
    delta = branch.fn(x)
    return out + delta if branch.rows is None else _AddToFeatures.apply(out, delta, branch.rows)


class _AddToFeatures(torch.autograd.Function):
    """out[..., rows] += delta, in place, without the gradient copies that autograd's slicing would make."""

    @staticmethod
    def forward(ctx, out, delta, rows):
        ctx.rows = rows
        ctx.mark_dirty(out)
        out[..., rows] += delta
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, grad[..., ctx.rows], None


class PortedLinear(nn.Linear):
    """`nn.Linear` with a side port. State-dict keys are those of `nn.Linear`.

    Branches treat each token by itself: not every call brings all tokens of a sequence.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, name: str) -> None:
        super().__init__(in_features, out_features, bias)
        self.side = SidePort(name)
        self._narrow = NarrowCopy()

    @property
    def keeps_zeros(self) -> bool:
        """Whether a token of zeros comes out as zeros, and gives no weight a gradient."""
        return self.bias is None and all(getattr(b.fn, "low_rank", None) is not None for b in self.side.branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.side.linear(x, self._narrow.of(self.weight, compute_dtype(x)), self.bias)


class NarrowCopy:
    """A frozen weight in another dtype, cast once: autocast itself casts frozen weights again in every call."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._copy: Tensor | None = None

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`; `weight` itself where it is trained, or no parameter but computed in every call."""
        if dtype == weight.dtype or weight.requires_grad or not isinstance(weight, nn.Parameter):
            return weight
        key = weight.data_ptr(), weight._version, weight.device, weight.dtype, dtype
        if key != self._key:
            self._key, self._copy = key, weight.detach().to(dtype)
        return self._copy

    def __deepcopy__(self, memo: dict) -> "NarrowCopy":
        return NarrowCopy()  # it belongs to one weight

    def __getstate__(self) -> dict:
        return {"_key": None, "_copy": None}


class PortedPatches(nn.Conv2d):
    """A patch embedding: `nn.Conv2d` without padding, and a side port on its input and output maps.

    Computed as one matrix product over the patches: cuDNN's convolutions take seven times as long for so wide a stride.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, stride: int, *, name: str) -> None:
        super().__init__(in_chans, embed_dim, patch_size, stride)
        self.side = SidePort(name)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, D, rows, columns]."""
        size, stride = self.kernel_size[0], self.stride[0]
        patches = x.to(compute_dtype(x)).unfold(2, size, stride).unfold(3, size, stride)  # [B, C, rows, columns, p, p]
        flat = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
        out = F.linear(flat, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return self.side(x, out)


@dataclass(frozen=True)
class Joined:
    """Tokens with others joined in, as an affix port returns them.

    buffers: one tensor [B, L', C] that both scan directions read, or two (forward, backward).
    keep: for each buffer, where the original L tokens are (a slice or an index tensor [L]).
    """

    buffers: tuple[Tensor, ...]
    keep: tuple[slice | Tensor, ...]


class AffixPort(Port):
    """Takes `value(tokens) -> Joined`. With `inner` it joins in_proj's output, else in_proj's input.

    An inner one whose tokens all stand at the ends says how many in front and behind (`ends`). It can then be called as
    `value(tokens, has_room=True)`, with zeros there to be overwritten.
    """

    inner: bool = True
    ends: tuple[int, int] | None = None
    joined = Joined  # so that an owner can return one without knowing the backbone's files

    def set(
        self,
        owner: str,
        value: Callable[..., Joined],
        *,
        inner: bool = True,
        ends: tuple[int, int] | None = None,
    ) -> None:
        super().set(owner, value)
        self.inner, self.ends = inner, ends
