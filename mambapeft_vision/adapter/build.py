"""Methods from configs and adapters, which are untrusted data and can name nothing but methods."""

import importlib
import re
from collections.abc import Mapping
from typing import Any

from mambapeft_vision.methods.method import Method
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.typed import check_arguments

_METHOD_TARGET = re.compile(r"mambapeft_vision\.methods\.[a-z][a-z0-9_]*\.[A-Z][A-Za-z0-9]*")
_LARGEST = 2**31 - 1  # largest whole number in a spec: products of two fit the 64 bits of a tensor's size


def build_method(name: str, spec: Any, source: str) -> Method:
    """Builds a method from `_target_` and its arguments. The spec is untrusted: it can name no other class.

    source: where the spec stands, for messages: `<source>.<name>`. Raises: UserError.
    """
    where = f"{source}.{plain(name)}"
    if not isinstance(spec, Mapping):
        raise UserError(f"{where}={shown(spec)}; expected a mapping with _target_ and arguments")
    arguments = {key: value for key, value in spec.items() if key != "_target_"}
    cls = _method_class(spec.get("_target_"), where)
    check_arguments(cls, arguments, where)
    for key, value in arguments.items():
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"{where}.{key}={shown(value)}; expected at most {_LARGEST:,}. Give a smaller one")
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except TypeError as error:
        raise UserError(f"{where}: arguments do not fit {cls.__name__}: {error}") from error


def _method_class(target: Any, where: str) -> type[Method]:
    if not isinstance(target, str) or not _METHOD_TARGET.fullmatch(target):
        raise UserError(f"{where} names {shown(target)}; only classes in mambapeft_vision.methods are allowed")
    module_name, _, class_name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where} names {target}, which does not exist here: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)) or cls is Method:
        raise UserError(f"{where} names {target}, which is no Method; only subclasses of it are allowed")
    return cls
