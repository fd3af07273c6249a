"""Fetches, lays out and checks data: mambapeft prepare vtab1k, mambapeft prepare mini."""

from collections.abc import Sequence
from importlib import import_module

from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.typed import nearest

SETS = {
    "vtab1k": ("mambapeft_vision.data.prepare.vtab1k", "the 19 tasks of VTAB-1K"),
    "mini": ("mambapeft_vision.commands.prepare_mini", "the tasks of the mini benchmark, and images of your own"),
}


def main(arguments: Sequence[str]) -> int | None:
    listed = "\n".join(f"  {name:<8}{what}" for name, (_, what) in SETS.items())
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
    code: int | None = import_module(SETS[name][0]).main(rest)
    return code
