"""What a PEFT method is, and the two ways it takes part in a backbone: deltas of weights, and ports.

A method is one file with a subclass of `Method` and one yaml. It owns its tensors: what is trained, saved, loaded,
decayed and merged follows from ownership, never from the names of parameters.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mambapeft_vision.utils.errors import UserError


class Method(nn.Module):
    """Base of all PEFT methods.

    Constructor arguments are keyword-only and kept as attributes of the same name (so `config()` can record them).
    A subclass implements `attach` and, where its tensors do not all share one multiplier, `param_groups`.

    Args:
        lr_mult: factor on the learning rate of this method's tensors.
        decay_mult: factor on their weight decay.
    """

    #: Whether the adapted model equals the base model before the first step.
    identity_at_init: ClassVar[bool] = True
    #: Why this method cannot be folded into the backbone's weights; None: it can.
    merge_obstacle: str | None = None
    #: Methods attach in this order, then by name: -1 draws the backbone's weights anew; 0 most; 1 changes shapes;
    #: 2 needs to see the final shapes.
    attach_order: ClassVar[int] = 0
    #: Optimiser steps after which `finish_warmup` is due; 0: the method has one phase.
    warmup_steps: int = 0

    def __init__(self, *, lr_mult: float = 1.0, decay_mult: float = 1.0) -> None:
        super().__init__()
        for name, value in (("lr_mult", lr_mult), ("decay_mult", decay_mult)):
            if not value >= 0:
                raise UserError(f"{type(self).__name__}: {name}={value!r}; expected a number >= 0")
        self.lr_mult, self.decay_mult = lr_mult, decay_mult
        self.name = type(self).__name__  # replaced by the key in `method:` when adapted

    def attach(self, model: nn.Module) -> None:
        """Creates this method's tensors and connects them to the ports and weights of `model`.

        Called once, under a random state that depends only on the run's seed and this method's name.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement attach(model)")

    def owned(self) -> dict[str, nn.Parameter]:
        """The tensors this method trains, by the names they are saved under."""
        return {plain_name(name): p for name, p in self.named_parameters()}

    def saved(self) -> dict[str, Tensor]:
        """The tensors that make up this method's saved state: what it owns and its persistent buffers."""
        own = self.owned()
        buffers = {plain_name(n): b for n, b in self.state_dict(keep_vars=True).items()}
        return {**{n: b for n, b in buffers.items() if not isinstance(b, nn.Parameter)}, **own}

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of owned tensors: dicts with params, lr_mult and decay_mult."""
        return [{"params": list(self.owned().values()), "lr_mult": self.lr_mult, "decay_mult": self.decay_mult}]

    def to_weight_space(self, model: nn.Module) -> None:
        """Replaces branches on activations by equal deltas of weights, as the first step of a merge."""

    def fold(self) -> None:
        """Simplifies a method that stays attached in a merged model, without changing what it computes."""

    @property
    def warming_up(self) -> bool:
        """Whether the warm-up phase is still to be finished; follows from `saved()`, so it survives a restart."""
        return False

    def finish_warmup(self) -> str:
        """Ends the warm-up phase. From now on other tensors are owned, so the optimiser must be built again.

        The training loop calls it once, after `warmup_steps` optimiser steps, while `warming_up`, and starts the new
        optimiser without the old one's state.
        Returns: one line for the log, saying what was chosen.
        """
        raise NotImplementedError(f"{type(self).__name__} has no warm-up phase (warmup_steps is 0)")

    def index_limits(self) -> dict[str, int]:
        """Of saved tensors that hold places in others: by saved name, the number of places there are."""
        return {}

    def enter_phase_of(self, saved: Mapping[str, Tensor]) -> None:
        """Takes the phase in which `saved` (this method's tensors by their saved names) was saved, to load it next."""

    def config(self) -> dict[str, Any]:
        """`_target_` and the constructor's arguments: JSON-safe, and enough to build this method again."""
        names: set[str] = set()
        for cls in type(self).__mro__:
            if "__init__" not in vars(cls):
                continue
            parameters = inspect.signature(cls.__init__).parameters.values()
            names |= {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
                break  # takes nothing that it does not name
        arguments = {name: _plain(getattr(self, name)) for name in sorted(names)}
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **arguments}

    def describe(self) -> list[dict[str, Any]]:
        """The sites of this method, for the table that `dry_run=true` prints: one row for each owned tensor."""
        mults = {id(p): (g["lr_mult"], g["decay_mult"]) for g in self.param_groups() for p in g["params"]}
        return [
            {"site": name, "shape": tuple(p.shape), "lr_mult": mults[id(p)][0], "decay_mult": mults[id(p)][1]}
            for name, p in self.owned().items()
        ]


def site_key(name: str) -> str:
    """A parameter name as a key of `nn.ModuleDict` / `nn.ParameterDict`, which do not allow dots."""
    return name.replace(".", "/")


def plain_name(name: str) -> str:
    """The name a tensor is saved under: sites in plain dots, without the container's own name."""
    return name.removeprefix("sites.").replace("/", ".")


def _plain(value: Any) -> Any:
    """Containers as the types JSON gives back."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def require_positive(method: Method, **values: int) -> None:
    """Raises for sizes (ranks, token counts, …) that are not whole numbers >= 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{type(method).__name__}: {name}={value!r}; expected a whole number >= 1 "
                f"(to switch the method off, leave it out of method=[...])"
            )


def require_matrix(weight: Tensor, parameter: str, who: str) -> None:
    """Raises for a bias, a norm, D, …: a vector has no rank to lower."""
    if weight.ndim < 2:
        raise UserError(
            f"{who}: {parameter} is a vector of {weight.numel()} numbers; expected a weight of two dimensions or more. "
            f"Change targets, or train it with Offset"
        )


def require_ported_linear(module: nn.Module, attribute: str, parameter: str, who: str) -> None:
    """Raises unless a parameter is the weight of a linear map beside which branches can run."""
    if not (isinstance(module, nn.Linear) and attribute == "weight" and hasattr(module, "side")):
        raise UserError(
            f"{who}: {parameter} is no weight of a linear map with a port on activations; change targets to those of "
            f"in_proj, out_proj (Vim) or attn, mlp (ViT)"
        )


def require_dropout(method: Method, dropout: float) -> None:
    """Raises for a dropout rate outside [0, 1)."""
    if not 0 <= dropout < 1:
        raise UserError(f"{type(method).__name__}: dropout={dropout!r}; expected 0 <= dropout < 1")


# ------------------------------------------------------------------------------------------------------------
# Names of a backbone's parameters


def backbone_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The backbone's own (frozen) parameters by their plain names, whatever has been attached to them."""
    return {_canonical(name): p for name, p in model.named_parameters()}


def _canonical(name: str) -> str:
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


def match_parameters(model: nn.Module, patterns: str | Iterable[str], who: str, each: bool = True) -> list[str]:
    """Names of the backbone's parameters that match any pattern, in the backbone's order.

    `*` stands for anything within one part of the name, `**` for any number of parts; patterns match whole names.
    Raises: UserError naming the pattern that matches nothing, and the nearest names. Without `each`
    a pattern may match nothing, for names that only some backbones have.
    """
    names = [n for n in backbone_parameters(model) if not n.startswith("head.")]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expression = re.compile(
            re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", r"[^.]*"),
        )
        matches = [n for n in names if expression.fullmatch(n)]
        if not matches and each:
            shapes = sorted({re.sub(r"\.\d+\.", ".*.", n) for n in names})
            near = difflib.get_close_matches(pattern, shapes, n=3, cutoff=0.3) or shapes
            raise UserError(
                f"{who}: {pattern!r} matches no parameter of {type(model).__name__}; nearest: {', '.join(near)}"
            )
        found.update(matches)
    return [n for n in names if n in found]


def frozen_weight(model: nn.Module, parameter: str) -> Tensor:
    """The backbone's own tensor under a plain name, without anything that is attached to it."""
    module, attribute = owner_module(model, parameter)
    if parametrize.is_parametrized(module, attribute):
        return module.parametrizations[attribute].original
    return getattr(module, attribute)


def owner_module(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The submodule that holds a parameter, and its attribute name there."""
    path, _, attribute = parameter.rpartition(".")
    return model.get_submodule(path), attribute


def mixers_of(model: nn.Module, who: str) -> list[nn.Module]:
    """The Mamba mixers of a backbone, first to last. Raises UserError for a backbone that has none."""
    if not hasattr(model, "mixers"):
        raise UserError(f"{who} works inside Mamba mixers, but {type(model).__name__} has none; use a Vim backbone")
    return model.mixers


def scan_weights(model: nn.Module, who: str) -> list[tuple[str, str]]:
    """Names of A_log and x_proj's weight of every mixer, for the forward and the backward direction each."""
    pairs = (("A_log", "x_proj.weight"), ("A_b_log", "x_proj_b.weight"))
    mixers = range(len(mixers_of(model, who)))
    return [(f"layers.{i}.mixer.{log}", f"layers.{i}.mixer.{rows}") for i in mixers for log, rows in pairs]


def blocks_of(model: nn.Module, who: str) -> dict[str, nn.Module]:
    """The transformer blocks of a backbone by name. Raises UserError for a backbone that has none."""
    if not hasattr(model, "blocks"):
        raise UserError(f"{who} works on transformer blocks, but {type(model).__name__} has none; use backbone=vit_s")
    return {f"blocks.{i}": block for i, block in enumerate(model.blocks)}


def row_slice(model: nn.Module, parameter: str, rows: str | None, who: str) -> slice | None:
    """The rows that a named block (x, z, d, b, c) covers. Raises UserError naming the blocks there are."""
    if rows is None:
        return None
    blocks = model.row_blocks(parameter)
    if rows not in blocks:
        known = ", ".join(blocks) or "none"
        raise UserError(f"{who}: rows={rows!r} is no block of {parameter}; blocks of it: {known}")
    return blocks[rows]


# ------------------------------------------------------------------------------------------------------------
# Deltas of weights


class WeightPort(nn.Module):
    """The one parametrization of a weight: W → reshape(W + Σ deltas(W)).

    Deltas are functions of the frozen weight (or of some of its rows) and add up, so their order does not matter.
    A reshape (extra states) comes last and has one owner. Users are kept outside PyTorch's module tree: the
    methods own their tensors.
    """

    def __init__(self, parameter: str) -> None:
        super().__init__()
        self.parameter = parameter
        self.deltas: list[tuple[str, Callable[[Tensor], Tensor], slice | None]] = []
        self.reshape: tuple[str, Callable[[Tensor], Tensor]] | None = None

    def forward(self, original: Tensor) -> Tensor:
        total = original
        for _, delta, rows in self.deltas:
            if rows is None:
                total = total + delta(original)
            else:
                middle = total[rows] + delta(original[rows])
                total = torch.cat((total[: rows.start], middle, total[rows.stop :]))
        return total if self.reshape is None else self.reshape[1](total)


def weight_port(model: nn.Module, parameter: str) -> WeightPort:
    """The weight port of a parameter, made on first use."""
    module, attribute = owner_module(model, parameter)
    if not parametrize.is_parametrized(module, attribute):
        # unsafe: a reshape may change the shape, and no inverse is needed.
        parametrize.register_parametrization(module, attribute, WeightPort(parameter), unsafe=True)
    return module.parametrizations[attribute][0]


def add_weight_delta(
    model: nn.Module,
    parameter: str,
    owner: str,
    delta: Callable[[Tensor], Tensor],
    rows: slice | None = None,
) -> None:
    """Adds `delta(W)` (or, with rows, `delta(W[rows])`) to a weight wherever the backbone reads it."""
    weight_port(model, parameter).deltas.append((owner, delta, rows))


def set_weight_reshape(model: nn.Module, parameter: str, owner: str, reshape: Callable[[Tensor], Tensor]) -> None:
    """Lets `reshape` change the shape of a weight, after all deltas. Raises UserError for a second owner."""
    port = weight_port(model, parameter)
    if port.reshape is not None:
        raise UserError(
            f"both {port.reshape[0]!r} and {owner!r} want to change the shape of {parameter}; "
            f"remove one of them from method=[...]"
        )
    port.reshape = (owner, reshape)


def bake_weights(model: nn.Module) -> None:
    """Replaces every weight that has a port by its present value, and removes the ports."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        with torch.no_grad():
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        # Not `remove_parametrizations`: it edits the class that deep copies of this module share with it.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            setattr(module, name, nn.Parameter(value, requires_grad=False))
