"""The parameters of a backbone that a method works on: roles, patterns of names, rows, groups."""

import difflib
import functools
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, nn

from mambapeft_vision.backbones.contract import ROLES, Backbone, Mixer, Ported, WeightPort
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import shown

LONGEST_PATTERN = 200
MOST_TARGETS = 50


def match_parameters(model: Backbone, targets: str | Iterable[str], who: str, each: bool = True) -> list[str]:
    """Names of the parameters that the targets match, in the backbone's order; parameters of the head never match.

    Args:
        targets: each a role of the backbone (in_proj, x_proj, qkv, …; see `contract.ROLES`), or a pattern of whole
            names, where `*` stands for anything within one part of a name and `**` for any number of parts.
        each: whether every target must match; if false, a target may name parts that only other backbones have.
    Raises: UserError naming the role that the backbone lacks and those it has, or the pattern that matches nothing and
        the nearest names.
    """
    names = [name for name, _ in model.named_parameters() if not name.startswith("head.")]
    found: set[str] = set()
    listed = [targets] if isinstance(targets, str) else list(targets)
    if len(listed) > MOST_TARGETS:
        raise UserError(f"{who}: {len(listed):,} targets; expected at most {MOST_TARGETS}. Write patterns with *")
    for target in listed:
        if target in model.roles:
            found.update(model.roles[target])
            continue
        matches = _matching(target, names)
        if not matches and each:
            raise UserError(f"{who}: {_reason(model, target, names)}")
        found.update(matches)
    return [name for name in names if name in found]


def match_or_default(
    model: Backbone, targets: str | Iterable[str] | None, default: Iterable[str], who: str
) -> list[str]:
    """As `match_parameters`; for None the parameters of all default roles that the backbone has."""
    if targets is not None:
        return match_parameters(model, targets, who)
    found = match_parameters(model, default, who, each=False)
    if not found:
        raise UserError(f"{who}: {type(model).__name__} has none of {', '.join(default)}; set targets")
    return found


def role(model: Backbone, name: str, who: str) -> tuple[str, ...]:
    """Names of the parameters with a role, block after block. Raises UserError where the backbone lacks it."""
    if name not in model.roles:
        raise UserError(f"{who}: {_reason(model, name, [])}")
    return model.roles[name]


def _matching(pattern: str, names: list[str]) -> list[str]:
    if len(pattern) > LONGEST_PATTERN:
        raise UserError(f"{shown(pattern)}; expected a pattern of at most {LONGEST_PATTERN} characters. Shorten it")
    return [name for name in names if fits(pattern, name)]


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name, in time linear in both.

    `*` stands for any characters but dots, also none; `**` for one character or more of any kind. All places of the
    pattern that a prefix of the name can reach are followed at once, as bits of a number, so nothing is tried twice.
    """
    length, letters_at, within, across = _places_of(pattern)
    places = 1
    for character in [None, *name]:
        if character is not None:
            letters = letters_at.get(character, 0)
            stay = across | (0 if character == "." else within)
            places = ((places & (letters | across)) << 1) | (places & stay)
        while (more := places | ((places & within) << 1)) != places:  # a star that stands for nothing
            places = more
    return bool(places >> length & 1)


@functools.lru_cache(maxsize=256)
def _places_of(pattern: str) -> tuple[int, dict[str, int], int, int]:
    """Length of a pattern, and the places of each letter, of `*` and of `**` in it as bits of a number."""
    tokens = re.findall(r"\*\*|.", pattern, re.DOTALL)
    places: dict[str, int] = defaultdict(int)
    for place, token in enumerate(tokens):
        places[token] |= 1 << place
    within, across = places.pop("*", 0), places.pop("**", 0)
    return len(tokens), dict(places), within, across


def _reason(model: Backbone, target: str, names: list[str]) -> str:
    """Why `target` matches no parameter."""
    kind, roles = type(model).__name__, ", ".join(model.roles)
    if target in ROLES:
        return f"{kind} has no {target!r} ({ROLES[target]}); its roles: {roles}"
    shapes = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    near = difflib.get_close_matches(target[:LONGEST_PATTERN], [*model.roles, *shapes], n=3, cutoff=0.3) or shapes
    return f"{shown(target)} matches no parameter of {kind}; nearest: {', '.join(near)}. Its roles: {roles}"


def owner_module(model: Backbone, parameter: str) -> tuple[nn.Module, str]:
    """The submodule that holds a parameter, and its attribute name there."""
    path, _, attribute = parameter.rpartition(".")
    return model.get_submodule(path), attribute


def frozen_weight(model: Backbone, parameter: str) -> Tensor:
    """The backbone's own tensor, without anything that is attached to it."""
    module, attribute = owner_module(model, parameter)
    return getattr(module, attribute)


def weight_port(model: Backbone, parameter: str) -> WeightPort:
    """The port through which the backbone reads a parameter. Raises UserError for one that is read without a port."""
    module, attribute = owner_module(model, parameter)
    if not isinstance(module, Ported):
        raise UserError(
            f"{parameter} has no weight port; expected a parameter that {type(model).__name__} reads through one"
        )
    return module.weight_port(attribute, parameter)


def row_slice(model: Backbone, parameter: str, rows: str | None, who: str) -> slice | None:
    """The rows (axis -2) that a named block (x, z, d, b, c) covers. Raises UserError naming the blocks there are."""
    if rows is None:
        return None
    blocks = model.row_blocks(parameter)
    if rows not in blocks:
        known = ", ".join(blocks) or "none"
        raise UserError(f"{who}: rows={rows!r} is no block of {parameter}; blocks of it: {known}")
    return blocks[rows]


def rows_of(weight: Tensor, rows: slice | None) -> Tensor:
    """Some rows (axis -2) of a weight, or all of it."""
    return weight if rows is None else weight[..., rows, :]


def group_count(model: Backbone, parameter: str) -> int | None:
    """K of a grouped weight [K, rows, columns], which is K independent matrices; None for any other.

    The weight of a convolution has three axes or more too, and is no group.
    """
    module, _ = owner_module(model, parameter)
    weight = frozen_weight(model, parameter)
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return len(weight) if weight.ndim == 3 and not convolution and weight.shape[0] > 1 else None


def mixers_of(model: Backbone, who: str) -> list[Mixer]:
    """The mixers of a backbone, first to last. Raises UserError for a backbone that has none."""
    if not model.mixers:
        raise UserError(f"{who} works inside Mamba mixers, but {type(model).__name__} has none; use a Vim backbone")
    return list(model.mixers)


def one_width(model: Backbone, who: str) -> int:
    """D of the tokens of every block. Raises UserError where blocks differ in it."""
    widths = sorted({block.embed_dim for block in model.blocks})
    if len(widths) > 1:
        raise UserError(
            f"{who} works on blocks of one width, but those of {type(model).__name__} have {widths}; use a backbone "
            f"of Vim's family or a ViT"
        )
    return widths[0]


def scan_weights(model: Backbone, who: str) -> list[tuple[str, str]]:
    """Names of A_log and of x_proj's weight of every mixer, for each direction that has its own."""
    mixers_of(model, who)
    return list(zip(role(model, "A_log", who), role(model, "x_proj", who), strict=True))


def like(model: Backbone) -> Tensor:
    """Any parameter of the backbone: its device and dtype are those of new tensors."""
    return next(model.parameters())
