"""Attacks by files, as rows of a table: each runs in a child process with limits of time, memory and disk.

A row is a function that gets a `World`, prepares the attack in it, and returns what the user would do with it:

    TABLE, attack = hostile.table()

    @attack("a result that is a pipe", words=["pipe"])
    def _(world):
        os.mkfifo(world.folder / "result.json")
        return lambda: read_json(world.folder / "result.json")

    @pytest.mark.parametrize("name", TABLE)
    def test_attack(name, tmp_path):
        hostile.check(TABLE[name], name, tmp_path)

The action has to end with a `UserError` that has all of `words`; without `words` it has to succeed (and may check by
itself that nothing bad happened). In both cases the victim file stays as it is, and the limits hold.
With `pytest -s` each row prints what it took.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from helpers.file_size import limit_for_good

from mambapeft_vision.utils.errors import UserError

MIB = 1 << 20
LONGEST_MESSAGE = 3_000


@dataclass(frozen=True)
class World:
    """folder: empty, for the attack; victim: a file of the user's beside it."""

    folder: Path
    victim: Path

    def link(self, name: str) -> Path:
        """A link to the victim under this name in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(self.victim)
        return path


Action = Callable[[], object]


@dataclass(frozen=True)
class Attack:
    """seconds: of CPU time; mib: of memory beyond what the process had; disk_mib: written to the folder."""

    prepare: Callable[[World], Action]
    words: Sequence[str]
    seconds: float
    mib: int
    disk_mib: int


@dataclass(frozen=True)
class Outcome:
    """refused: the message of a UserError; None: the action succeeded. failure: any other end, as text."""

    refused: str | None
    failure: str | None
    cpu_seconds: float
    mib: float


Prepare = Callable[[World], Action]


def table(mib: int = 300, disk_mib: int = 10) -> tuple[dict[str, Attack], Callable[..., Callable[[Prepare], Prepare]]]:
    """An empty table, and the decorator that adds a row to it. mib, disk_mib: of rows that say nothing else."""
    rows: dict[str, Attack] = {}

    def attack(
        name: str,
        words: Sequence[str] = (),
        *,
        seconds: float = 5.0,
        mib: int = mib,
        disk_mib: int = disk_mib,
    ) -> Callable[[Prepare], Prepare]:
        def add(prepare: Prepare) -> Prepare:
            assert name not in rows, name
            rows[name] = Attack(prepare, words, seconds, mib, disk_mib)
            return prepare

        return add

    return rows, attack


def check(row: Attack, name: str, folder: Path) -> None:
    """Carries a row out in `folder`, an empty one, and asserts that the attack fails."""
    outcome = outcome_of(row, folder)
    assert outcome is not None, "a limit of time or disk ended the process"
    print(f"{outcome.cpu_seconds:6.2f} s {outcome.mib:6.0f} MiB  {name}")
    assert outcome.failure is None, outcome.failure
    if row.words:
        assert outcome.refused is not None, "it was accepted"
        assert all(word in outcome.refused for word in row.words), outcome.refused
        assert len(outcome.refused) < LONGEST_MESSAGE
        assert outcome.refused.replace("\n", "").isprintable(), ascii(outcome.refused)
    else:
        assert outcome.refused is None, outcome.refused
    assert outcome.cpu_seconds < row.seconds and outcome.mib < row.mib, outcome
    assert disk_use(folder) < row.disk_mib
    assert (folder / "victim").read_text() == "precious"


def outcome_of(row: Attack, folder: Path) -> Outcome | None:
    """The outcome of a row in a child process; None where a limit of time or disk has ended it."""
    context = multiprocessing.get_context("fork")  # a row need not be found again by name
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=carry_out, args=(theirs, row, folder))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        process.join()


def carry_out(answer: Connection, row: Attack, folder: Path) -> None:
    """In the child process: prepares the attack, takes the limits upon itself, acts, and answers with an `Outcome`."""
    world = make_world(folder)
    action = row.prepare(world)
    _limit(row)
    before = _cpu_seconds(), _peak_mib(reset=True)
    refused = failure = None
    try:
        action()
    except UserError as error:
        refused = str(error)
    except BaseException as error:  # whatever else comes out is what the row is to find
        failure = "".join(traceback.format_exception(error))[-3_000:]
    answer.send(Outcome(refused, failure, _cpu_seconds() - before[0], _peak_mib() - before[1]))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_mib(reset: bool = False) -> float:
    """Peak of the resident memory, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def make_world(folder: Path) -> World:
    world = World(folder / "attack", folder / "victim")
    world.folder.mkdir(exist_ok=True)
    world.victim.write_text("precious")
    return world


def disk_use(folder: Path) -> float:
    """What a folder takes of the disk, in MiB."""
    total = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total / MIB


def _limit(row: Attack) -> None:
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    # Address space, which threads and maps take more of than memory; what is measured in the end is memory.
    ceiling = in_use + (2 * row.mib + 1024) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    limit_for_good(row.disk_mib * MIB)
    seconds = int(row.seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.alarm(10 * seconds)  # for what waits and computes nothing
