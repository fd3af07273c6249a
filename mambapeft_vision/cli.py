"""The command `mambapeft`: one subcommand for each thing that the project does. `mambapeft --help` lists them.

Light to import: a command's own module, and PyTorch with it, is imported when the command is called. Nothing else is
imported before `run` can answer Ctrl-C.
"""

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from mambapeft_vision import __version__
from mambapeft_vision.sweep import fork_server
from mambapeft_vision.utils.startup import imports_kept

if TYPE_CHECKING:
    from mambapeft_vision.run.arguments import ArgumentParser

# Command → what it does; the module of its name in mambapeft_vision/commands does it.
COMMANDS = {
    "train": "fine-tune a backbone on a task, or on many (-m)",
    "evaluate": "merge and test the adapter of a finished run again",
    "predict": "predict the classes of new images with a finished run",
    "explain": "draw the parts of an image that decide a prediction",
    "rerun": "repeat a recorded run from its result.json",
    "sweep": "train many runs on all GPUs: tasks x methods x seeds",
    "search": "search for a hybrid of methods",
    "tune": "tune the settings of one method",
    "pretrain": "pretrain a backbone on labelled images",
    "prepare": "fetch, lay out and check data: vtab1k, mini, fgvc, few-shot",
    "tables": "compare finished runs with the published numbers in tables",
    "explore": "write all finished runs into one page to sort and filter",
    "ensemble": "average the probabilities of finished runs",
    "interpolate": "interpolate between pretrained and adapted weights, with a factor chosen on val200",
    "report": "write every table and picture of finished runs into one folder",
    "reproduce": "reproduce the whole table of MambaPEFT: sweep, collect, report",
    "convert": "convert from the published code and peft; write plain checkpoints and hub folders",
    "export": "export a trained model: ONNX, torch.export, timm, official, peft, LoRA",
    "count": "count the trained parameters of every preset and compare them with the published table",
    "keys": "list the keys of a config with type, default and meaning",
    "methods": "list the methods, or describe some",
    "mini": "run the mini benchmark: every method on 13 small tasks, on any small backbone",
    "demo": "fine-tune a small pretrained Vim three ways on a CPU",
    "check-science": "check on a CPU that scratch < linear_probe < lora_p_x, with nine runs a small backbone",
    "sync": "upload finished runs to Weights & Biases",
    "cache": "list or clean the cache of decoded images",
}

_FORK_WORKERS = {"sweep", "reproduce", "mini", "demo", "check-science"}
_ONLY_SHOWS = {"--dry-run", "--help", "-h", "pack", "unpack", "document", "compare"}


def main(arguments: Sequence[str]) -> int | None:
    """Calls a command with the rest of the command line. Returns its exit code; None is success.

    Example: `main(["train", "method=lora_p_x", "dry_run=true"])`.
    Raises: UserError.
    """
    if not arguments or arguments[0].startswith("-"):
        parser = _parser()
        parser.parse_args(arguments)
        parser.print_help()
        return None
    command, *rest = arguments
    if command not in COMMANDS:
        from mambapeft_vision.utils.typed import nearest

        _parser().error(f"{command} is no command; {nearest(command, COMMANDS)}")
    if command in _FORK_WORKERS and not _ONLY_SHOWS & set(rest):
        fork_server.start()  # it imports for the workers what this process imports next, and at the same time
    with imports_kept():
        module = import_module(f"mambapeft_vision.commands.{command.replace('-', '_')}")
    code: int | None = module.main(rest)
    return code


def run(*command: str) -> None:
    """The whole of a program: `main` with this process's command line behind `command`, then the exit code."""
    try:
        from mambapeft_vision.run.exit import run_cli  # Hydra's import takes a moment, in which Ctrl-C may come
    except KeyboardInterrupt:
        sys.exit(130)  # as run/exit.py has it
    run_cli(partial(main, [*command, *sys.argv[1:]]))


def _parser() -> "ArgumentParser":
    from mambapeft_vision.run.arguments import ArgumentParser

    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    parser = ArgumentParser(
        "mambapeft",
        f"Parameter-efficient fine-tuning of vision state-space models.\n\ncommands:\n{listed}\n\n"
        "`mambapeft COMMAND --help` says more.",
        usage="mambapeft COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser
