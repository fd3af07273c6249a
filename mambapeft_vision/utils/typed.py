"""Types of values from configs, files and callers, checked strictly against annotations.

Pydantic decides what fits: nothing is converted but a whole number to a float, a list to a tuple and text to a path.
Its errors become one `UserError` that names every wrong key, what was given and what was expected.
"""

import difflib
import functools
import inspect
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown

T = TypeVar("T")

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
_LONGEST_NAME, _LONGEST_LIST = 100, 2_500  # characters of a name, and of many, in a hint
_SHOWN = 6  # problems named in one message
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "text",
    NoneType: "null",
    dict: "keys and values",
}


def build(kind: type[T], content: Any, where: str, *, remedy: str = "") -> T:
    """Makes a dataclass (or any annotated type) from the plain values of a file.

    Args:
        kind: the type; dataclasses may hold further ones, also in lists and dicts.
        content: mappings, lists, text, numbers, booleans and None, as JSON and YAML give them.
        where: the file or section, for messages.
        remedy: what to do about a mistake; ends the message.

    Raises:
        UserError: naming unknown and missing keys, and the values of the wrong type. An error that the dataclass
            raises itself (`__post_init__`) is passed on.

    Example:
        >>> build(Progress, {"done": 1, "total": "2", "seconds": 0}, "state.json")
        UserError: state.json: total='2'; expected a whole number or null
    """
    try:
        adapter: TypeAdapter[list[T]] = _adapter(kind)  # type: ignore[arg-type] # classes are hashable
        return adapter.validate_json(_as_json([content], where))[0]
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, UserError):
                raise cause from None
        problems = _problems(error, kind, content)
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        end = f". {remedy}" if remedy else ""
        raise UserError(f"{where}: {'; '.join(problems[:_SHOWN])}{more}{end}") from None


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], group: str) -> None:
    """Checks that `function` can be called with `arguments`, whose values come from a config or an adapter.

    Args:
        function: a function or class; parameters without annotation, and those whose types no config can express,
            take any value.
        group: the config group, for messages.

    Raises:
        UserError: for arguments that `function` does not take, lacks, or wants of another type.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    known = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(known) == len(parameters):
        for key in arguments:
            if key not in known:
                raise UserError(f"{group}.{plain(key)} is no key of {function.__name__}; {nearest(str(key), known)}")
    for key, value in arguments.items():
        expected = expected_kind(value, parameters[key].annotation) if key in parameters else None
        if expected is not None:
            raise UserError(f"{group}.{key}={shown(value)}; expected {expected}")
    missing = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise UserError(f"{group} lacks {', '.join(missing)}, which {function.__name__} needs")


def expected_kind(value: Any, annotation: Any) -> str | None:
    """The type that `annotation` expects, in words; None if `value` fits or no config can express the annotation."""
    if annotation is inspect.Parameter.empty:
        return None
    try:
        _adapter(annotation).validate_json(_as_json([value], "value"))
    except ValidationError as error:
        if any(detail["type"] == "needs_python_object" for detail in error.errors(include_url=False)):
            return None
        return describe(annotation)
    return None


def describe(annotation: Any) -> str:
    """An annotation in words: `int | None` → `a whole number or null`."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    return " or ".join(sorted({_word(option) for option in _options(annotation)}))


# Other programs' names of our keys, where the letters are too far from ours.
_OTHER_NAMES = {
    "bs": "batch_size",
    "epochs": "max_epochs",
    "gpus": "devices",
    "lr": "learning_rate",
    "r": "rank",
    "wd": "weight_decay",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean a, b?`, or all known names if none is near. The names may come from an untrusted file."""
    known = sorted(plain(k, _LONGEST_NAME) for k in known)
    also = [_OTHER_NAMES[name]] if _OTHER_NAMES.get(name) in known else []
    near = also or difflib.get_close_matches(name[:_LONGEST_NAME], known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"known: {plain(', '.join(known), _LONGEST_LIST)}"


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    # Pydantic takes no config for a dataclass of others, but passes that of a list on to what the list holds.
    return TypeAdapter(list[kind], config=_STRICT)  # type: ignore[valid-type]


def _as_json(content: Any, where: str) -> str:
    """JSON is what pydantic reads strictly and still builds dataclasses, tuples and paths from."""

    def other(value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else {"object": type(value).__name__}

    try:
        text = json.dumps(content, default=other, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: text that is not UTF-8; expected text. Write it again in UTF-8") from None
    except (RecursionError, ValueError):
        raise UserError(f"{where}: nested too deeply; expected keys and values. Write it again") from None
    return text


def _word(option: Any) -> str:
    if is_dataclass(option):
        return "keys and values"
    return _WORDS.get(option, _WORDS.get(get_origin(option), "a list"))


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _problems(error: ValidationError, kind: Any, content: Any) -> list[str]:
    """One text for each wrong place; the choices of a union are one place."""
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path, annotation, value, parent = _located(detail["loc"][1:], kind, content)
        key = ".".join(path) or "the content"
        if detail["type"] == "unexpected_keyword_argument":
            found[key] = f"{key} is unknown; {nearest(path[-1], _fields_of(parent))}"
        elif detail["type"] == "missing" and len(path) == len(detail["loc"]) - 1:
            found[key] = f"{key} is missing; expected {describe(annotation)}"
        else:
            expected = f"{describe(annotation)}, finite" if detail["type"] == "finite_number" else describe(annotation)
            if get_origin(annotation) in (tuple, list) and isinstance(value, (list, tuple)):
                expected = f"{len(get_args(annotation))} values"
            found[key] = f"{key}={shown(value)}; expected {expected}"
    return list(found.values())


def _located(loc: Sequence[str | int], kind: Any, content: Any) -> tuple[list[str], Any, Any, Any]:
    """Follows the place of an error → dotted path, annotation and value there, and the annotation around it."""
    path: list[str] = []
    parent: Any = None
    for step in loc:
        options = [option for option in _options(kind) if option is not NoneType]
        if len(options) > 1:
            break  # the steps inside a union name its choices
        inner = options[0]
        if is_dataclass(inner):
            following = get_type_hints(inner).get(str(step), Any)
        elif get_origin(inner) is dict:
            following = get_args(inner)[1]
        elif get_origin(inner) is tuple and isinstance(step, int) and step >= len(get_args(inner)):
            break
        elif get_origin(inner) in (list, tuple) and isinstance(content, (list, tuple)) and int(step) < len(content):
            following = get_args(inner)[min(int(step), len(get_args(inner)) - 1)]
        else:
            break  # a tuple that is too short
        path.append(plain(step))
        parent, kind = inner, following
        if isinstance(content, Mapping):
            content = content.get(step)
        else:
            content = content[int(step)] if isinstance(content, (list, tuple)) else None
    return path, kind, content, parent


def _fields_of(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []
