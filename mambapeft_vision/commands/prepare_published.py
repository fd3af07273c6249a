"""Makes tasks from benchmarks with published splits: mambapeft prepare fgvc, mambapeft prepare few-shot."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mambapeft_vision.data.prepare.published import FEW_SHOT, FGVC, prepare_few_shot, prepare_fgvc
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.text import command, override

_KINDS = {
    "fgvc": (
        FGVC,
        prepare_fgvc,
        "train.json, val.json and test.json of VPT",
        "mambapeft prepare fgvc cub --lists vpt/CUB --images CUB_200_2011/images",
    ),
    "few-shot": (
        FEW_SHOT,
        prepare_few_shot,
        "train_meta.list.num_shot_1.seed_0 … test_meta.list of NOAH",
        "mambapeft prepare few-shot pets --lists few-shot/oxford-pets/annotations --images oxford-pets/images",
    ),
}


def main(kind: str, arguments: Sequence[str]) -> None:
    table, prepare, lists, example = _KINDS[kind]
    family = kind.replace("-", "")
    parser = ArgumentParser(
        f"mambapeft prepare {kind}",
        f"Makes a task from published splits and your copy of the images; checks every image.\n\nexample:\n  {example}",
    )
    parser.add_argument("task", choices=list(table), help="name of the benchmark's task")
    parser.add_argument("--lists", type=Path, required=True, metavar="DIR", help=f"folder with {lists}")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder that the lists' paths start from"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("data") / family, help="folder of the task folders (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    folder = options.root.expanduser() / options.task
    for note in prepare(table[options.task], options.lists.expanduser(), options.images.expanduser(), folder):
        say(note)
    train = ["mambapeft", "train", f"dataset={family}/{options.task}"]
    if options.root != Path("data") / family:
        train.append(override("dataset.folder", folder))
    say(f"Train with: {command(*train)}")


fgvc, few_shot = partial(main, "fgvc"), partial(main, "few-shot")
