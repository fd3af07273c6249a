"""What takes tests time and tells them nothing."""

import importlib.metadata
import io
import os
import pickle
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml

LONGEST_YAML = 20_000  # characters


@cache
def skip_what_costs_time() -> None:
    """For the rest of this process and its forks.

    Files are not forced to the disk: that helps where a machine loses its power, and tests kill processes alone.
    The entry points of what is installed are read once: Lightning asks for them at every run. So are files of configs.
    torch.manual_seed notes its calls, with a traceback, for each kind of device that is not there: not so here.
    """
    os.fsync = lambda _: None
    importlib.metadata.entry_points = cache(importlib.metadata.entry_points)
    if registry := sys.modules.get("lightning.fabric.utilities.registry"):
        registry.entry_points = importlib.metadata.entry_points
    _parse_yaml_once()
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        for devices in (torch.cuda, torch.cuda.random, torch.xpu, torch.xpu.random, torch.mtia):
            devices._lazy_call = lambda *_, **__: None


def _parse_yaml_once() -> None:
    """Files of configs are parsed once, however often they are composed. What cannot be parsed is parsed as ever."""
    parse, parsed = yaml.load, dict[tuple[str, str], bytes]()

    def load(stream: Any, Loader: type) -> object:
        if not isinstance(stream, io.TextIOWrapper) or not stream.seekable():
            return parse(stream, Loader)
        begin = stream.tell()
        known = stream.read(LONGEST_YAML), Loader.__qualname__
        if known not in parsed:
            stream.seek(begin)
            content = parse(stream, Loader)
            if len(known[0]) == LONGEST_YAML:
                return content
            parsed[known] = pickle.dumps(content)
        return pickle.loads(parsed[known])

    yaml.load = load


def quicken_the_interpreter() -> None:
    """Triton's interpreter prepares triton.language when a kernel is launched, and not at each call within it too.

    That took two fifths of the time of its tests. What is computed is the same.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    prepare, call = interpreter._patch_lang, interpreter.InterpretedFunction.__call__
    calls = 0

    def prepare_once(function: Callable[..., object]) -> object:
        languages = [function.__globals__[name] for name in ("tl", "core") if name in function.__globals__]
        is_prepared = languages and not any(is_builtin(language.arange) for language in languages)
        return None if calls and is_prepared else prepare(function)

    def call_within(self: Any, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        try:
            return call(self, *args, **kwargs)
        finally:
            calls -= 1

    interpreter._patch_lang, interpreter.InterpretedFunction.__call__ = prepare_once, call_within

    numpy_type, known = interpreter._get_np_dtype, dict[str, Any]()

    def known_type(kind: Any) -> object:
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_type(kind)
        return known[name]

    interpreter._get_np_dtype = known_type
