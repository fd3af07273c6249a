"""Arguments from configs and adapters, checked before anything is called with them."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from mambapeft_vision.utils.errors import UserError


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], group: str) -> None:
    """Raises UserError, named after `group`, for arguments that `function` does not take, lacks, or wants otherwise."""
    parameters = inspect.signature(function, eval_str=True).parameters
    known = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(known) == len(parameters):
        for key in arguments:
            if key not in known:
                raise UserError(f"{group}.{key} is no key of {function.__name__}; {nearest(key, known)}")
    for key, value in arguments.items():
        expected = expected_kind(value, parameters[key].annotation) if key in parameters else None
        if expected is not None:
            raise UserError(f"{group}.{key}={value!r}; expected {expected}")
    missing = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise UserError(f"{group} lacks {', '.join(missing)}, which {function.__name__} needs")


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean a, b?`, or all known names where none is near."""
    known = sorted(str(k) for k in known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text"}


def expected_kind(value: Any, annotation: Any) -> str | None:
    """What an annotation of numbers, text and lists of them asks for, in words; None where `value` is that."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if any(_is_a(value, option) for option in options):
        return None
    words = {_KINDS.get(option, "null" if option in (None, type(None)) else "a list") for option in options}
    return " or ".join(sorted(words))


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (None, type(None)):
        return value is None
    if kind in _KINDS:
        accepted = {float: (int, float), Path: (str, Path)}.get(kind, kind)
        return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if get_origin(kind) in (list, tuple) and get_args(kind):
        item = get_args(kind)[0]
        return isinstance(value, (list, tuple)) and all(_is_a(v, item) for v in value)
    return True  # an annotation that says more than a config can check here
