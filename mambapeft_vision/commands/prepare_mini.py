"""Makes tasks of the mini benchmark from labelled images: mambapeft prepare mini --help."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.data.generated.mini import GENERATED, IMPORTED, lay_out_generated
from mambapeft_vision.data.manifest import read_entry
from mambapeft_vision.data.prepare.importer import import_task
from mambapeft_vision.data.prepare.torchvision_tasks import FETCHED, fetch_task
from mambapeft_vision.data.prepare.verify import TaskReport
from mambapeft_vision.data.tasks import GROUPS, Task, select_tasks
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.atomic import made_folder
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import command, override

EXAMPLES = """\
examples:
  mambapeft prepare mini import birds.npz --name birds     an npz file (format: data/README.md)
  mambapeft prepare mini import PHOTOS --name photos       a folder with one folder for each class
  mambapeft prepare mini all --from DIR                    DIR/usps.npz and so on: the 13 tasks of the table
  mambapeft prepare mini fetch svhn dtd                    downloads (torchvision); without names: all of them
  mambapeft prepare mini generate                          the tasks that need no data (also done at first use)
"""


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    with made_folder(options.out):
        options.run(options)


def import_one(options: argparse.Namespace) -> None:
    known = IMPORTED.get(options.name)
    group = options.group or (known.group if known else "custom")
    sizes = {"max_test": options.max_test, "seed": options.seed}
    report = import_task(options.path, options.name, options.out, group=group, **sizes)
    say(_summary(report))
    if known is None:
        folder = options.out / options.name
        train = command(
            *("mambapeft", "train", "dataset=folder", f"dataset.name=mini/{options.name}"),
            *(override("dataset.folder", folder), f"dataset.num_classes={report.task.num_classes}"),
        )
        say(f"Train with: {train}")


def import_all(options: argparse.Namespace) -> None:
    """Imports all tasks that are not laid out yet."""
    missing = [name for name in IMPORTED if not (options.source / f"{name}.npz").is_file()]
    if missing:
        raise UserError(f"{options.source} lacks {', '.join(f'{name}.npz' for name in missing)}. Correct --from.")
    for name, task in IMPORTED.items():
        if not _is_there(task, options.out):
            say(_summary(import_task(options.source / f"{name}.npz", name, options.out, group=task.group)))


def fetch(options: argparse.Namespace) -> None:
    """Fetches all tasks that are not laid out yet. A task that fails does not stop the others."""
    failed = []
    for task in select_tasks(options.names or None, {name: fetched.task for name, fetched in FETCHED.items()}):
        if _is_there(task, options.out):
            continue
        try:
            say(_summary(fetch_task(FETCHED[task.folder], options.out, options.downloads)))
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError("\n".join(failed))


def generate(options: argparse.Namespace) -> None:
    for task in GENERATED.values():
        lay_out_generated(task, options.out / task.folder)
        say(f"{task.name}: laid out")


def _is_there(task: Task, out: Path) -> bool:
    there = read_entry(out, task.folder) is not None and (out / task.folder).is_dir()
    if there:
        say(f"{task.name}: laid out before")
    return there


def _summary(report: TaskReport) -> str:
    task, entry = report.task, report.entry
    assert entry is not None, "what has been laid out has passed"
    notes = "".join(f"\n  note: {note}" for note in report.notes)
    counts = f"{task.num_train} + {task.num_val} to train, {task.num_test} to test"
    return f"{task.name}: {task.group}, {task.num_classes} classes, {counts}, sha256 {entry.sha256[:12]}{notes}"


def _parser() -> ArgumentParser:
    common = ArgumentParser(add_help=False)
    common.add_argument(
        "--out", type=Path, default=Path("data/mini"), help="folder of the task folders (default: %(default)s)"
    )
    parser = ArgumentParser(
        "mambapeft prepare mini", f"Makes tasks in the layout of VTAB-1K from labelled images.\n\n{EXAMPLES}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("import", parents=[common], help="one npz file or class-per-folder tree")
    one.add_argument("path", type=Path)
    one.add_argument("--name", required=True, help="name of the task and its folder")
    one.add_argument("--group", choices=GROUPS, help="for tables (default: the table's, else custom)")
    one.add_argument("--max-test", type=int, default=2000, help="test images at most, where none are marked")
    one.add_argument("--seed", type=int, default=0, help="seed of the splits, where none are marked")
    one.set_defaults(run=import_one)
    every = commands.add_parser("all", parents=[common], help="the 13 npz files of a folder")
    every.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR")
    every.set_defaults(run=import_all)
    online = commands.add_parser("fetch", parents=[common], help="tasks that torchvision downloads")
    online.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(FETCHED)} (default: all)")
    online.add_argument(
        "--downloads", type=Path, default=Path("data/downloads"), help="folder for archives (default: %(default)s)"
    )
    online.set_defaults(run=fetch)
    drawn = commands.add_parser("generate", parents=[common], help="the tasks that need no data")
    drawn.set_defaults(run=generate)
    return parser
