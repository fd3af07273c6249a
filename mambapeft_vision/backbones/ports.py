"""Ports: the named places of a backbone where something outside it may take part in the computation.

A port is empty by default and costs nothing then. The backbone defines where ports are and what passes through
them; it does not know their users. Every user of a port gives its name, so that conflicts can be reported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from mambapeft_kernels.derivatives import transformed
from mambapeft_kernels.low_rank.linear import LowRankFactors, add_low_rank, low_rank_linear
from torch import Tensor, nn

from mambapeft_vision.backbones.computed import make_permanent
from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.utils.errors import UserError


class Port:
    """A place for one owner. `value` is the owner's function, or None; `name` says where it is, for messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner: str | None = None
        self.value: Any = None

    def set(self, owner: str, value: Any) -> None:
        """Puts the function `value` of the method `owner` here. Raises UserError if another method is here already."""
        if self.owner is not None:
            raise UserError(
                f"port {self.name!r} takes one method, but both {self.owner!r} and {owner!r} want it; "
                f"remove one of them from method=[...]"
            )
        self.owner, self.value = owner, value


class InputPort(Port):
    """Takes one function of the tokens that enter a block (or the first block) and their layout.

    `value(tokens [B, L, D], layout) → (tokens [B, L', D], layout)`. It may run on no images at all ([0, L, D]), to find
    the layout that it leaves.
    """

    def __call__(self, tokens: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        return (tokens, layout) if self.value is None else self.value(tokens, layout)


class FunctionPort(Port):
    """Takes one function of a tensor, which keeps its shape."""

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.value is None else self.value(x)


class ReplacePort(Port):
    """Takes `value(tokens, layout) → (positions [n], new [B, n, D])`: new tokens for some positions of a block's input.

    The outputs of earlier blocks at these positions are dropped.
    """

    def __call__(self, hidden: Tensor, residual: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] each. Where there is a residual sum the new tokens stand in it, so that drop path spares them."""
        if self.value is None:
            return hidden, residual
        total = hidden if residual is None else residual
        positions, new = self.value(total, layout)
        total = total.index_copy(1, positions, new.to(total.dtype))
        return (total, None) if residual is None else (hidden.index_fill(1, positions, 0), total)


class BranchPort:
    """On a residual branch of a block: any number of functions add to its output, before the residual sum.

    A function gets the branch's input (the output of the norm), the branch's output (without other functions) and the
    layout of both: (x [B, L, D], out [B, L, D], layout) → [B, L, D].
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.functions: list[tuple[str, Callable[[Tensor, Tensor, TokenLayout], Tensor]]] = []

    def add(self, owner: str, function: Callable[[Tensor, Tensor, TokenLayout], Tensor]) -> None:
        """Adds `function` of the method `owner`."""
        self.functions.append((owner, function))

    def __call__(self, x: Tensor, out: Tensor, layout: TokenLayout) -> Tensor:
        total = out
        for _, function in self.functions:
            total = total + function(x, out, layout)
        return total


class TapPort:
    """Hands a block's output [B, L, D] and its layout to any number of readers; no gradient comes back from them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.readers: list[tuple[str, Callable[[Tensor, TokenLayout], None]]] = []

    def add(self, owner: str, reader: Callable[[Tensor, TokenLayout], None]) -> None:
        """Adds a reader of the method `owner`; it is called with each output."""
        self.readers.append((owner, reader))

    def remove(self, owner: str) -> None:
        """Removes the reader of the method `owner`."""
        self.readers = [(name, reader) for name, reader in self.readers if name != owner]

    def __call__(self, tokens: Tensor, layout: TokenLayout) -> None:
        for _, reader in self.readers:
            reader(tokens.detach(), layout)


# ------------------------------------------------------------------------------------------------------------
# Beside a map


class LowRankPair(Protocol):
    """The owner of the factors down [r, in] and up [features, r]."""

    down: Any
    up: Any


@dataclass(frozen=True, eq=False)
class LowRankBranch:
    """scale · up(down(x)) on the features `rows`, with dropout on the input or between down and up.

    pair: the owner of both factors. They are read in each pass, as others may stand in a parameter's place
        (`torch.func.functional_call`, offloading, parametrizations).
    rows: output features it is added to, None: all.
    """

    owner: str
    pair: LowRankPair
    scale: float
    dropout: float = 0.0
    dropout_on: Literal["input", "middle"] = "middle"
    rows: slice | None = None

    @property
    def down(self) -> Tensor:
        return self.pair.down

    @property
    def up(self) -> Tensor:
        return self.pair.up

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """The definition. Beside a linear map `SidePort.linear` computes the same by fused products."""
        on_input, on_middle = (self.dropout if self.dropout_on == place else 0.0 for place in ("input", "middle"))
        low = F.linear(F.dropout(x, on_input, training), self.down)
        return F.linear(F.dropout(low, on_middle, training), self.scale * self.up)


@dataclass(frozen=True, eq=False)
class FunctionBranch:
    """Any function of the module's input, added to the features `rows` of its output (None: all)."""

    owner: str
    function: Callable[[Tensor], Tensor]
    rows: slice | None = None

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        return self.function(x)


class SidePort:
    """A place for any number of branches beside a map; their outputs are added to its output. name: for messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.branches: list[LowRankBranch | FunctionBranch] = []

    def add(self, branch: LowRankBranch | FunctionBranch) -> None:
        """Adds `branch`; branches do not depend on their order."""
        self.branches.append(branch)

    def remove(self, owner: str) -> None:
        """Removes all branches of the method `owner`."""
        self.branches = [branch for branch in self.branches if branch.owner != owner]

    @property
    def only_low_rank(self) -> bool:
        """Whether fused products can compute all branches."""
        return all(isinstance(branch, LowRankBranch) for branch in self.branches)

    def __call__(self, x: Tensor, out: Tensor, training: bool) -> Tensor:
        """out + every branch(x): the definition for any kind of map."""
        for branch in self.branches:
            out = _add(branch, x, out, training)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """F.linear(x, weight, bias) and all branches.

        Low-rank branches with the same dropout between down and up share one product; the first such group is computed
        together with the map itself. A branch with dropout on its input has a product of its own.
        """
        if transformed():
            return self(x, F.linear(x, weight, bias), training)
        groups: dict[float, list[LowRankFactors]] = {}
        apart: list[tuple[Tensor, LowRankFactors]] = []
        functions: list[FunctionBranch] = []
        for branch in self.branches:
            if isinstance(branch, FunctionBranch):
                functions.append(branch)
            elif branch.dropout_on == "input":
                dropped = F.dropout(x, branch.dropout, training)
                apart.append((dropped, LowRankFactors(branch.down, branch.up, branch.scale, 0.0, branch.rows)))
            else:
                dropout = branch.dropout if training else 0.0
                factors = LowRankFactors(branch.down, branch.up, branch.scale, dropout, branch.rows)
                groups.setdefault(dropout, []).append(factors)
        joined = list(groups.values())
        out = low_rank_linear(x, weight, bias, joined[0]) if joined else F.linear(x, weight, bias)
        for group in joined[1:]:
            out = add_low_rank(out, x, group)
        for dropped, factors in apart:
            out = add_low_rank(out, dropped, [factors])
        for function in functions:
            out = _add(function, x, out, training)
        return out


def _add(branch: LowRankBranch | FunctionBranch, x: Tensor, out: Tensor, training: bool) -> Tensor:
    delta = branch(x, training)
    if branch.rows is None:
        return out + delta
    if transformed():
        start, stop, _ = branch.rows.indices(out.shape[-1])
        return out + F.pad(delta, (start, out.shape[-1] - stop))
    return _AddToFeatures.apply(out, delta, branch.rows)


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


# ------------------------------------------------------------------------------------------------------------
# Inside a mixer


@dataclass(frozen=True)
class Joined:
    """Tokens with others joined in, as an affix port returns them.

    buffers: one tensor [B, L', C] that both scan directions read, or two (forward, backward).
    keep: for each buffer, where the original L tokens are (a slice or an index tensor [L]).
    """

    buffers: tuple[Tensor, ...]
    keep: tuple[slice | Tensor, ...]


class AffixPort(Port):
    """Takes `value(tokens, layout) -> Joined`. With `inner` it joins in_proj's output, else in_proj's input.

    A mixer with four directions calls it a second time, with `pair=1` and the tokens as its other two read them.

    An inner one whose tokens all stand at the ends says how many in front and behind (`ends`). It can then be called as
    `value(tokens, layout, has_room=True)`, with zeros there to be overwritten; `layout` is that without them.
    """

    inner: bool = True
    ends: tuple[int, int] | None = None

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


class PrefixPort(Port):
    """Takes `value() → [K, n, E]`: n tokens in front of the sequence of each of a mixer's K directions.

    They join after the convolution. As they do not depend on the image, the scans need only the states that they leave.
    """


# ------------------------------------------------------------------------------------------------------------
# Weights


class WeightPort:
    """The port of one weight, applied where the backbone reads it: W → reshape(W + Σ delta(W)).

    Deltas are functions of the frozen weight (or of some of its rows, axis -2) and add up, so their order does not
    matter. A reshape (extra states) comes last and has one owner.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self.deltas: list[tuple[str, Callable[[Tensor], Tensor], slice | None]] = []
        self.reshape: tuple[str, Callable[[Tensor], Tensor]] | None = None

    def add(self, owner: str, delta: Callable[[Tensor], Tensor], rows: slice | None = None) -> None:
        """Adds delta(W) to the weight; with rows delta(W[..., rows, :]) to these."""
        self.deltas.append((owner, delta, rows))

    def set_reshape(self, owner: str, reshape: Callable[[Tensor], Tensor]) -> None:
        """Lets `reshape` change the weight's shape, after all deltas. Raises UserError for a second owner."""
        if self.reshape is not None:
            raise UserError(
                f"both {self.reshape[0]!r} and {owner!r} want to change the shape of {self.parameter}; "
                f"remove one of them from method=[...]"
            )
        self.reshape = owner, reshape

    def __call__(self, weight: Tensor) -> Tensor:
        total = weight
        for _, delta, rows in self.deltas:
            if rows is None:
                total = total + delta(weight)
            else:
                middle = total[..., rows, :] + delta(weight[..., rows, :])
                total = torch.cat((total[..., : rows.start, :], middle, total[..., rows.stop :, :]), dim=-2)
        return total if self.reshape is None else self.reshape[1](total)


class Ported(nn.Module):
    """A module that reads its parameters through ports. Its state dict has the keys it has without them.

    A subclass reads a parameter as `self.read("weight")`, wherever it computes with it.
    """

    #: Parameters that are read in the dtype of the activations, for `frozen_casts`.
    cast_weights: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weight_ports: dict[str, WeightPort] = {}
        self.casts: dict[str, tuple[Tensor, Tensor]] = {}  # name → the weight that was cast, and its cast

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The present value of a parameter: the output of its port, or the parameter itself if it has no port.

        dtype: in which it will be used; a cast is returned where `frozen_casts` holds one.
        """
        weight = getattr(self, name)  # in a parametrized or pruned module the computed value
        port = self._weight_ports.get(name)
        if port is not None:
            return port(weight)
        source, cast = self.casts.get(name, (None, None))
        return cast if cast is not None and source is weight and cast.dtype == dtype else weight

    def weight_port(self, name: str, parameter: str) -> WeightPort:
        """The port of the parameter `name`, made on first use; `parameter` is its name in the whole model."""
        return self._weight_ports.setdefault(name, WeightPort(parameter))

    @property
    def weight_ports(self) -> tuple[WeightPort, ...]:
        """The ports of this module's parameters that have one."""
        return tuple(self._weight_ports.values())

    @torch.no_grad()
    def bake(self) -> None:
        """Sets every parameter that has a port to its present value, and removes the ports."""
        for name in list(self._weight_ports):
            make_permanent(self, name)
            value = self.read(name).detach().clone()
            del self._weight_ports[name]
            setattr(self, name, nn.Parameter(value, requires_grad=False))


def bake_weights(model: nn.Module) -> None:
    """Replaces every weight that has a port by its present value, and removes the ports."""
    for module in model.modules():
        if isinstance(module, Ported):
            module.bake()


def taken_ports(model: nn.Module) -> list[str]:
    """Names of the ports and weights that something is attached to."""
    taken = []
    for module in model.modules():
        if isinstance(module, Ported):
            taken += [port.parameter for port in module.weight_ports]
        for port in vars(module).values():
            in_use = (
                (isinstance(port, Port) and port.owner is not None)
                or (isinstance(port, SidePort) and port.branches)
                or (isinstance(port, TapPort) and port.readers)
                or (isinstance(port, BranchPort) and port.functions)
            )
            if in_use:
                taken.append(port.name)
    return taken


@contextmanager
def frozen_casts(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within this context frozen weights of linear maps are cast to `dtype` once, instead of in every pass.

    A training step or an evaluation enters it while it owns the model. Frozen weights must not be written to within it,
    and nothing is kept beyond it. dtype: autocast's; None: there is nothing to cast.
    """
    held = [
        (module, name, weight)
        for module in model.modules()
        if dtype is not None and isinstance(module, Ported)
        for name in module.cast_weights
        for weight in (getattr(module, name),)
        if isinstance(weight, nn.Parameter) and not weight.requires_grad and weight.dtype != dtype
    ]
    with torch.no_grad():
        casts = [torch.empty_like(weight, dtype=dtype) for *_, weight in held]
        if casts:
            torch._foreach_copy_(casts, [weight for *_, weight in held])  # a few launches for all of them
    try:
        for (module, name, weight), cast in zip(held, casts):
            module.casts[name] = weight, cast
        yield
    finally:
        for module, name, _ in held:
            module.casts.pop(name, None)
