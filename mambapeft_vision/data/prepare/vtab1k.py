"""The work of `mambapeft prepare vtab1k`: get VTAB-1K, lay it out, check all of it, write the manifest."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mambapeft_vision.data.image_list import parse_list
from mambapeft_vision.data.manifest import (
    MANIFEST_FILE,
    drop_entry,
    is_as_verified,
    read_entry,
    write_entry,
    write_source,
)
from mambapeft_vision.data.prepare.archive import MAX_BYTES, copy_tasks, extract_tasks
from mambapeft_vision.data.prepare.download import ARCHIVE_NAME, fetch_archive
from mambapeft_vision.data.prepare.verify import TaskReport, verify_task
from mambapeft_vision.data.tasks import TASKS, Task, prepare_command, select_tasks
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import INTERRUPTED, UserError
from mambapeft_vision.utils.hashing import sha256_file
from mambapeft_vision.utils.processes import available_cpus
from mambapeft_vision.utils.progress import ConsoleProgress
from mambapeft_vision.utils.text import command

GOOD, BAD = 0, 2
PROBLEMS_FILE = "problems.txt"
_SHOWN_PROBLEMS = 20

_EPILOG = f"""\
examples:
  mambapeft prepare vtab1k                        download, lay out and check all 19 tasks
  mambapeft prepare vtab1k --zip {ARCHIVE_NAME}      the same from an archive already here
  mambapeft prepare vtab1k --tasks cifar,dtd      only some tasks
  mambapeft prepare vtab1k --verify-only          check once more what is laid out

Interrupt it whenever you like: the same command continues.
Exit code 0: all good; 2: a report says what is not.
"""


def main(argv: Sequence[str] | None = None, table: dict[str, Task] = TASKS) -> int:
    """Runs the command; returns the exit code: 0 good, 2 with a report on stderr, 130 interrupted.

    Raises: UserError or OSError for what keeps it from checking anything.
    """
    options = _parser().parse_args(argv)
    try:
        tasks = select_tasks(options.tasks, table)
        if not options.verify_only:
            lay_out(options, tasks)
        return _report(options, verify(options, tasks))
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        return INTERRUPTED
    except BrokenProcessPool:
        print(
            "A worker process died, most likely for lack of memory. Run again with fewer --workers.",
            file=sys.stderr,
        )
        return BAD


def lay_out(options: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Brings the missing folders of `tasks` into `options.root`; touches no other folder."""
    root: Path = options.root
    missing = [task for task in tasks if not (root / task.folder).exists()]
    if not missing:
        print(f"All {len(tasks)} tasks are laid out in {root}.")
        return
    print(f"{len(missing)} of {len(tasks)} tasks are not in {root} yet.")
    for task in missing:
        drop_entry(root, task.folder)  # the folder was deleted since, so its new content must be checked
    if options.folder is not None:
        if options.sha256 is not None:
            raise UserError("--sha256 is of an archive, and --folder takes none. Leave one of them out.")
        copy = ConsoleProgress("copying", "files")
        copy_tasks(options.folder, root, missing, max_bytes=round(options.max_gb * 1e9), progress=copy)
        write_source(root, {"folder": str(options.folder)})
        return
    archive = options.zip
    if archive is None:
        archive = fetch_archive(root.parent / f"{root.name}.download")
    if not archive.is_file():
        raise UserError(f"{archive} is missing: expected the VTAB-1K zip. Correct --zip, or leave it out to download.")
    sha256 = _checked_sha256(archive, options.sha256)
    write = ConsoleProgress("extracting", "B")
    extract_tasks(archive, root, missing, max_bytes=round(options.max_gb * 1e9), progress=write)
    write_source(root, {"archive": archive.name, "bytes": archive.stat().st_size, "sha256": sha256})
    if options.zip is None:
        print(f"Laid out. The archive is no longer needed: {archive}")


def verify(options: argparse.Namespace, tasks: Sequence[Task]) -> list[TaskReport]:
    """Checks the tasks one by one and keeps the manifest up to date after each.

    Without --verify-only, tasks that the manifest has already, with the same list files, are not checked again.
    """
    reports = []
    with _workers(options.workers) as executor:
        for task in tasks:
            folder = options.root / task.folder
            if not options.verify_only and verified_before(options.root, task, decode=not options.fast):
                print(f"{task.folder}: verified before")
                continue
            progress = ConsoleProgress(task.folder, "images")
            report = verify_task(task, folder, decode=not options.fast, executor=executor, progress=progress)
            if report.entry is not None:
                write_entry(options.root, task.folder, report.entry, report.states)
            else:
                drop_entry(options.root, task.folder)
            print(_summary(report))
            reports.append(report)
    return reports


def verified_before(root: Path, task: Task, *, decode: bool) -> bool:
    """Whether the manifest has the task, checked as thoroughly as asked for and with today's lists and images."""
    try:
        entry = read_entry(root, task.folder)
        if entry is None or (decode and not entry.decoded):
            return False
        listings = [parse_list(root / task.folder / f"{split}.txt", task.num_classes)[0] for split in entry.lists]
        return all(listing.sha256 == entry.lists[listing.file.stem] for listing in listings) and is_as_verified(
            root / task.folder, entry, listings
        )
    except (UserError, OSError):  # a damaged entry, a list or an image that is missing: found when it is verified
        return False


def _checked_sha256(archive: Path, pinned: str | None) -> str:
    sha256 = sha256_file(archive, ConsoleProgress("checksum", "B"))
    print(f"{archive}: {archive.stat().st_size:,} bytes, sha256 {sha256}")
    if pinned is not None and pinned.lower() != sha256:
        raise UserError(
            f"{archive} has sha256 {sha256}: expected {pinned.lower()}, as given with --sha256. "
            "Delete the archive and get it again, or correct --sha256."
        )
    return sha256


def _summary(report: TaskReport) -> str:
    task, entry = report.task, report.entry
    notes = "".join(f"\n  note: {note}" for note in report.notes)
    if entry is None:
        return f"{task.folder}: {len(report.problems):,} PROBLEMS{notes}"
    how = "decoded" if entry.decoded else "headers read"
    return (
        f"{task.folder}: good ({task.group}, {task.num_classes} classes, {entry.images:,} images {how}, "
        f"sha256 {entry.sha256[:12]}){notes}"
    )


def _report(options: argparse.Namespace, reports: Sequence[TaskReport]) -> int:
    """Prints the outcome and writes all problems to a file; returns the exit code."""
    root: Path = options.root
    bad = [report for report in reports if report.problems]
    problems_file = root / PROBLEMS_FILE
    if not bad:
        problems_file.unlink(missing_ok=True)
        print(f"All good. Manifest: {root / MANIFEST_FILE}")
        return GOOD
    lines = []
    for report in bad:
        lines += [
            "",
            f"{report.task.folder}: {len(report.problems):,} problems",
            *report.problems[:_SHOWN_PROBLEMS],
        ]
        if len(report.problems) > _SHOWN_PROBLEMS:
            lines.append(f"… and {len(report.problems) - _SHOWN_PROBLEMS:,} more")
    root.mkdir(parents=True, exist_ok=True)
    everything = [problem for report in bad for problem in report.problems]
    write_text(problems_file, "\n".join(everything) + "\n")
    folders = command(*(root / report.task.folder for report in bad))
    lines += [
        "",
        f"{len(bad)} of the tasks are not usable; all {len(everything):,} problems are in {problems_file}.",
        f"To get them anew, delete what there is of {folders}",
        f"and run `{prepare_command(root)}` again. The other tasks stay as they are.",
    ]
    say("\n".join(lines), sys.stderr)
    return BAD


@contextlib.contextmanager
def _workers(count: int) -> Iterator[Executor | None]:
    """A pool of `count` processes, or None for one. Leaving it early drops the work that waits."""
    if count == 1:
        yield None
        return
    pool = ProcessPoolExecutor(count, initializer=_ignore_interrupt)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl-C is for the parent, which stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mambapeft prepare vtab1k",
        description="Fetch VTAB-1K, lay out its 19 tasks, check everything, and write manifest.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("data/vtab-1k"),
        help="folder of the task folders (default: %(default)s)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--zip", type=Path, metavar="FILE", help="take this archive instead of downloading")
    source.add_argument("--folder", type=Path, metavar="DIR", help="copy from task folders already here")
    source.add_argument("--verify-only", action="store_true", help="only check, and check everything again")
    parser.add_argument("--tasks", type=_comma_list, metavar="A,B", help="only these tasks (default: all 19)")
    parser.add_argument("--fast", action="store_true", help="read image headers only, decode nothing")
    parser.add_argument("--sha256", metavar="HEX", help="refuse an archive with another sha256")
    parser.add_argument(
        "--max-gb",
        type=float,
        default=MAX_BYTES / 1e9,
        help="refuse to extract more than this (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=available_cpus(),
        help="processes that check images (default: %(default)s)",
    )
    return parser


def _comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return value
