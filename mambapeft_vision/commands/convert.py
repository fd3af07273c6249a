"""Convert between formats.

from-peft        turns an adapter of Hugging Face peft into an adapter folder of ours
from-reference   turns an adapter trained with the published MambaPEFT code into an adapter folder of ours
merge            the same as `mambapeft export --to official`
to-hub           makes a folder for the Hugging Face hub of an adapter; uploads it with --push
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.own_code import OwnCode
from mambapeft_vision.utils.console import say

if TYPE_CHECKING:
    from mambapeft_vision.adapter.model import AdaptedModel


def parser() -> ArgumentParser:
    top = ArgumentParser("mambapeft convert", __doc__)
    commands = top.add_subparsers(dest="command", required=True)

    reference = commands.add_parser("from-reference", help="convert an adapter of the published code")
    reference.add_argument("config", help="config of the adapter: a .py file (parsed, never run) or JSON")
    reference.add_argument("checkpoint", help="the .pth file that the trainer saved")
    reference.add_argument("--weights", required=True, help="the backbone's official checkpoint")
    reference.add_argument("--out", required=True, help="folder to write")

    peft = commands.add_parser("from-peft", help="convert an adapter of Hugging Face peft")
    peft.add_argument("folder", help="folder that peft saved")
    peft.add_argument("--backbone", required=True, help="registered name of the adapter's backbone")
    peft.add_argument("--backbones", metavar="DIR", help="backbone files of your own, if it is one of them")
    peft.add_argument("--weights", default="official", help="official, random or a file with the backbone's weights")
    peft.add_argument("--out", required=True, help="folder to write")

    merge = commands.add_parser("merge", help="merge an adapter into the backbone, and write an official checkpoint")
    merge.add_argument("adapter", help="folder of a run or adapter")
    merge.add_argument("--weights", help="official, random or a file with the backbone's weights; default: the run's")
    merge.add_argument("--out", required=True, help=".pth or .safetensors to write")

    hub = commands.add_parser("to-hub", help="make a folder for the Hugging Face hub from an adapter")
    hub.add_argument("adapter", help="folder of a run or adapter")
    hub.add_argument("--out", required=True, help="folder to write")
    hub.add_argument("--push", metavar="USER/NAME", help="also upload it to this repository (needs a token)")
    hub.add_argument("--private", action="store_true", help="make a new repository private")
    hub.add_argument("--revision", metavar="BRANCH", help="upload to this branch")
    return top


def run(args: argparse.Namespace) -> None:
    # PyTorch's import, for which --help need not wait
    from mambapeft_vision.integrations.convert import convert_from_peft, from_reference
    from mambapeft_vision.integrations.export import Request, export
    from mambapeft_vision.integrations.hub import PLACEHOLDER, push_to_hub, to_hub_folder
    from mambapeft_vision.results.record import is_finished, read_record

    if args.command == "from-reference":
        _say_written(args.out, from_reference(args.config, args.checkpoint, args.weights, args.out))
    elif args.command == "from-peft":
        OwnCode(backbones=args.backbones).add()
        _say_written(args.out, convert_from_peft(args.folder, args.backbone, args.weights, args.out))
    elif args.command == "merge":
        say("\n".join(export(Request(args.adapter, args.out, args.weights), "official")))
    else:
        record = read_record(args.adapter) if is_finished(Path(args.adapter)) else None
        folder = to_hub_folder(args.adapter, args.out, record, args.push or PLACEHOLDER)
        say(f"wrote {folder}")
        if args.push:
            say(push_to_hub(folder, args.push, args.private, args.revision))


def _say_written(out: str, model: "AdaptedModel") -> None:
    say(f"wrote {out}: {', '.join(model.methods) or 'linear probe'}, {model.counts()['trainable']:,} trained")


def main(arguments: Sequence[str]) -> None:
    run(parser().parse_args(arguments))
