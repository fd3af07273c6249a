"""Fetches, lays out and checks data: mambapeft prepare vtab1k, mini, fgvc, few-shot."""

from collections.abc import Sequence
from importlib import import_module

from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.typed import nearest

SETS = {
    "vtab1k": ("mambapeft_vision.data.prepare.vtab1k", "main", "the 19 tasks of VTAB-1K"),
    "mini": ("mambapeft_vision.commands.prepare_mini", "main", "the tasks of the mini benchmark, and npz files"),
    "fgvc": ("mambapeft_vision.commands.prepare_published", "fgvc", "the five tasks of FGVC, with VPT's splits"),
    "few-shot": (
        "mambapeft_vision.commands.prepare_published",
        "few_shot",
        "the five few-shot tasks, with NOAH's splits",
    ),
}


def main(arguments: Sequence[str]) -> int | None:
    listed = "\n".join(f"  {name:<10}{what}" for name, (_, _, what) in SETS.items())
    parser = ArgumentParser(
        "mambapeft prepare",
        f"Fetches, lays out and checks data.\n\nsets:\n{listed}\n\n`mambapeft prepare SET --help` says more.",
        usage="%(prog)s SET ...",
    )
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.print_help()
        return None
    name, *rest = arguments
    if name not in SETS:
        parser.error(f"{name} is no set of images; {nearest(name, SETS)}")
    module, function, _ = SETS[name]
    code: int | None = getattr(import_module(module), function)(rest)
    return code
