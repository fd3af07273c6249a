"""Links, pipes and locks that somebody has planted where files are written, and others who use the same folders.

Scenario: outputs that were copied from a colleague with tar or rsync, or a folder that a group shares.
"""

import multiprocessing
import os
import stat
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import pytest
from helpers import hostile, runs
from helpers.hostile import Action, World
from omegaconf import OmegaConf

from mambapeft_vision.data.manifest import TaskEntry, drop_entry, read_entry, write_entry
from mambapeft_vision.integrations.wandb_logger import WandbLogger
from mambapeft_vision.results.layout import LOG_FILE, SWEEP_LOGS
from mambapeft_vision.results.plots import without_latex
from mambapeft_vision.run.exit import RememberLaunch
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.search.search import JOURNAL, Search, open_study
from mambapeft_vision.search.space import Space
from mambapeft_vision.sweep.jobs import plan_jobs
from mambapeft_vision.sweep.sweep import Command, sweep
from mambapeft_vision.sweep.worker import Assignment, print_to, run
from mambapeft_vision.sweep.worker_cache import Kept
from mambapeft_vision.utils.atomic import atomic_folder, atomic_path, open_log, write_text
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.git_checkout import checkout_state
from mambapeft_vision.utils.lock import InUseError, locked, one_at_a_time, sole_writer

TABLE, attack = hostile.table()

# Logs


def planted(world: World, name: str, kind: str) -> Path:
    path = world.folder / name
    if kind == "link":
        path.symlink_to(world.victim)
    elif kind == "dangling link":
        path.symlink_to(world.folder / "made")
    elif kind == "hard link":
        os.link(world.victim, path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/full")
    return path


KINDS = ("link", "dangling link", "hard link", "pipe", "link to a device")
for kind in KINDS:

    @attack(f"the log of a run is a {kind}", ["is a link or no plain file"], seconds=2)
    def _(world: World, kind: str = kind) -> Action:
        file = planted(world, LOG_FILE, kind)
        return lambda: Console(file).say("text")

    @attack(f"the log of a worker is a {kind}", seconds=2)
    def _(world: World, kind: str = kind) -> Action:
        file = planted(world, "worker0.log", kind)

        def act() -> None:
            print_to(file)
            print("text", flush=True)
            assert not (world.folder / "made").exists()

        return act


def test_a_log_is_appended_to(tmp_path):
    for text in ("a", "b"):
        with Console(tmp_path / LOG_FILE, stream=open(os.devnull, "w")) as console:
            console.say(text)
    assert (tmp_path / LOG_FILE).read_text() == "a\nb\n"
    with pytest.raises(FileNotFoundError):
        open_log(tmp_path / "no" / LOG_FILE)


# Links on the way to a run


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Overrides of a run; the outputs are to be added."""
    task = runs.lay_out_task(tmp_path_factory.mktemp("task"))
    return lambda outputs: runs.overrides(task, outputs, "trainer.max_epochs=1")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_run_is_not_written_through_a_link(command, tmp_path, level):
    """By the command and by a worker; not even the note of the failure is."""
    outputs, elsewhere = tmp_path / "outputs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    cfg = runs.compose_train(command(outputs))
    folder = make_plan(cfg).folder
    link = [folder, *folder.parents][level]
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link to .*elsewhere; expected none"):
        runs.run(command(outputs))
    outcome = run(Assignment(cfg, command(outputs), folder), Kept())
    assert outcome.record is None and "is a link to" in outcome.error
    assert not list(elsewhere.iterdir())


def test_outputs_may_be_a_link_of_the_users(command, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    assert runs.run([*command(tmp_path / "outputs"), "dry_run=true"]) is None
    cfg = runs.compose_train(command(tmp_path / "outputs"))
    assert "outputs" in str(make_plan(cfg).folder)


def test_a_sweeps_logs_are_not_written_through_a_link(command, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / SWEEP_LOGS).symlink_to(tmp_path / "elsewhere")
    jobs = plan_jobs(command(outputs), runs.CONFIGS)
    with pytest.raises(UserError, match="is a link to"):
        sweep(jobs, Command(command(outputs), 1))
    assert not list((tmp_path / "elsewhere").iterdir())


def launch(folder: Path, launcher: str = "hydra._internal.core_plugins.basic_launcher.BasicLauncher") -> None:
    """What Hydra calls before a sweep."""
    config = {"hydra": {"sweep": {"dir": str(folder), "subdir": "launch-1"}, "launcher": {"_target_": launcher}}}
    RememberLaunch().on_multirun_start(OmegaConf.create(config))


@pytest.mark.parametrize("name", [".", "multirun.yaml"])
def test_hydras_note_is_not_written_through_a_link(tmp_path, capsys, name):
    folder = tmp_path / SWEEP_LOGS
    if name == ".":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "victim")
    with pytest.raises(SystemExit, match="2"):
        launch(folder)
    assert "is a link to" in capsys.readouterr().err


SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"


def test_submitits_folder_is_private(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mambapeft_vision.run.exit.launches", [])
    folder = tmp_path / SWEEP_LOGS
    (folder / ".submitit").mkdir(parents=True)
    (folder / ".submitit").chmod(0o777)
    launch(folder, SUBMITIT)
    assert stat.S_IMODE((folder / ".submitit").stat().st_mode) == 0o700
    (folder / ".submitit" / "1").mkdir()
    (folder / ".submitit" / "1" / "1_submitted.pkl").symlink_to(tmp_path / "victim")
    with pytest.raises(SystemExit):
        launch(folder, SUBMITIT)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(SystemExit):
        launch(folder, SUBMITIT)
    assert "belongs to another user" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wandb", ".wandb"])
def test_wandbs_files_are_not_written_through_a_link(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path)
    logger = WandbLogger(project="p", entity=None, mode="offline", tags=[], pictures=False)
    with pytest.raises(UserError, match="is a link to"):
        logger.begin(id="a", dir=str(tmp_path / "run"))


# The current folder, where libraries look for settings of their own


@pytest.mark.parametrize("name", ["wandb", ".wandb"])
def test_settings_in_the_current_folder_do_not_choose_who_gets_the_users_key(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "settings").write_text("[default]\nbase_url = http://theirs.example\n")
    logger = WandbLogger(project="p", entity=None, mode="offline", tags=[], pictures=False)
    with pytest.raises(UserError, match="would choose the server that gets your key"):
        logger.begin(id="a", dir=str(tmp_path / "run"))


def test_settings_in_the_current_folder_do_not_make_texts_programs(tmp_path, monkeypatch):
    """Matplotlib has read the file when it was imported."""
    monkeypatch.chdir(tmp_path)
    with mpl.rc_context({"text.usetex": True}):
        without_latex()
        assert mpl.rcParams["text.usetex"]  # the user's own
        (tmp_path / "matplotlibrc").write_text("text.usetex: True")
        without_latex()
        assert not mpl.rcParams["text.usetex"]


def test_numbas_settings_in_the_current_folder_are_a_mistake_of_the_users(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: theirs")
    with pytest.raises(UserError, match="would tell Numba which code to run"):
        runs.run(command(tmp_path / "outputs"))


# Searches


def study(folder: Path) -> Callable[[], object]:
    space = Space(choose="all", tasks=("a",), parts={}, trainer_fixed={}, trainer_tune={})
    return lambda: open_study(Search("s", space, "validation", 1, folder, None, ()))


for kind in KINDS:

    @attack(f"the journal of a search is a {kind}", [JOURNAL], seconds=3)
    def _(world: World, kind: str = kind) -> Action:
        planted(world, JOURNAL, kind)
        return study(world.folder)


JOURNALS = {
    "no JSON": b"x\n",
    "a list": b"[]\n",
    "deep": b"[" * 100_000 + b"\n",
    "of unknown operations": b'{"op_code": 99}\n',
    "without fields": b'{"op_code": 0}\n',
    "of another kind": b'{"op_code": 0, "worker_id": [], "study_name": {}, "directions": 7}\n',
    "no text": b"\xff\xfe\n",
}
for name, content in JOURNALS.items():

    @attack(f"the journal of a search is {name}", ["the study s cannot be read"])
    def _(world: World, content: bytes = content) -> Action:
        (world.folder / JOURNAL).write_bytes(content)
        return study(world.folder)


@attack("the journal of a search is sparse", [JOURNAL, "bytes; expected at most"])
def _(world: World) -> Action:
    with open(world.folder / JOURNAL, "wb") as file:
        file.truncate(1 << 40)
    return study(world.folder)


@attack("the lock of a search leads nowhere", ["is a link to nothing"], seconds=2)
def _(world: World) -> Action:
    (world.folder / f"{JOURNAL}.lock").symlink_to("nowhere")
    return study(world.folder)


# The checkout


def a_checkout(world: World) -> Path:
    """A repository with a commit, without any program: the index and the commit's object are made here."""
    import hashlib
    import struct
    import zlib

    root, git = world.folder, world.folder / ".git"
    (root / "mambapeft_vision").mkdir()
    (root / "mambapeft_vision" / "__init__.py").write_text("")
    path = b"mambapeft_vision/__init__.py"
    entry = struct.pack(">10I", 0, 0, 0, 0, 0, 0, 0o100644, 0, 0, 0) + hashlib.sha1(b"blob 0\0").digest()
    entry += struct.pack(">H", len(path)) + path
    tree = b"TREE" + struct.pack(">I", 25) + b"\0" + b"1 0\n" + bytes(20)
    (git / "objects" / "aa").mkdir(parents=True)
    content = b"DIRC" + struct.pack(">II", 2, 1) + entry.ljust(-(-(len(entry) + 1) // 8) * 8, b"\0") + tree
    (git / "index").write_bytes(content + bytes(20))
    (git / "HEAD").write_text("a" * 40)
    commit = b"commit 46\0tree " + b"0" * 40 + b"\n"
    (git / "objects" / "aa" / ("a" * 38)).write_bytes(zlib.compress(commit))
    return root


@attack("a checkout, for comparison")
def _(world: World) -> Action:
    root = a_checkout(world)

    def act() -> None:
        assert checkout_state(root) == ("a" * 40, False)

    return act


@attack("a commit that unpacks to gigabytes", mib=50)
def _(world: World) -> Action:
    import zlib

    root = a_checkout(world)
    packer = zlib.compressobj(1)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(64)) + packer.flush()
    (root / ".git" / "objects" / "aa" / ("a" * 38)).write_bytes(bomb)
    return lambda: checkout_state(root)


@attack("a commit in a pack whose size never ends")
def _(world: World) -> Action:
    import struct

    root = a_checkout(world)
    (root / ".git" / "objects" / "aa" / ("a" * 38)).unlink()
    pack = root / ".git" / "objects" / "pack"
    pack.mkdir()
    counts = struct.pack(">256I", *(int(n >= 0xAA) for n in range(256)))
    index = b"\377tOc\0\0\0\2" + counts + b"\xaa" * 20 + bytes(4) + struct.pack(">I", 12)
    (pack / "a.idx").write_bytes(index)
    (pack / "a.pack").write_bytes(bytes(12) + b"\x9f" + b"\xff" * 8_000)
    return lambda: checkout_state(root)


@attack("an index of a hundred thousand files", seconds=1, mib=50)
def _(world: World) -> Action:
    root = a_checkout(world)
    index = root / ".git" / "index"
    content = bytearray(index.read_bytes())
    content[8:12] = (100_000).to_bytes(4, "big")
    index.write_bytes(content)

    def act() -> None:
        assert checkout_state(root) == (None, None)

    return act


for name in ("index", "HEAD", "commondir", "objects/aa/" + "a" * 38, "packed-refs"):

    @attack(f"{name[:10]} of a checkout is a pipe", seconds=2)
    def _(world: World, name: str = name) -> Action:
        root = a_checkout(world)
        (root / ".git" / name).unlink(missing_ok=True)
        os.mkfifo(root / ".git" / name)
        return lambda: checkout_state(root)


@pytest.mark.parametrize("name", TABLE)
def test_attack(name, tmp_path):
    hostile.check(TABLE[name], name, tmp_path)


# Other users of a folder


def as_another_user(work: Callable[[], object]) -> str:
    """What `work` says when another user does it: its error, or "done"."""

    def child(answer: Connection) -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            work()
            answer.send("done")
        except Exception as error:
            answer.send(f"{type(error).__name__}: {error}")

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    try:
        return ours.recv()
    finally:
        process.join()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT RUN: another user can be played by root alone")
SETTINGS = Path("/proc/sys/fs")


@pytest.fixture(params=[0o777, 0o1777], ids=["for all", "sticky"])
def shared(request):
    """A folder of ours that others can write to."""
    with tempfile.TemporaryDirectory() as name:  # below tmp_path nobody else may look
        Path(name).chmod(request.param)
        yield Path(name)


@pytest.fixture(params=["0", "1"])
def protected(request):
    """fs.protected_symlinks and its kin off and on, where they may be set (MAMBAPEFT_SET_SYSCTL=1)."""
    names = [SETTINGS / name for name in ("protected_symlinks", "protected_regular", "protected_fifos")]
    before = [file.read_text() for file in names if file.exists()]
    if all(text.strip() == request.param for text in before) and before:
        yield
        return
    if os.environ.get("MAMBAPEFT_SET_SYSCTL") != "1":
        pytest.skip(f"NOT RUN: fs.protected_* are {[text.strip() for text in before]}; set MAMBAPEFT_SET_SYSCTL=1")
    try:
        for file in names:
            file.write_text(request.param)
        yield
    finally:
        for file, text in zip(names, before):
            file.write_text(text)


@needs_root
def test_links_of_another_user_are_refused_whatever_the_system_protects(shared, protected, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    plant = SimpleNamespace(names=[".lock", ".x.part", "x.log", "x.txt"])

    def theirs() -> None:
        for name in plant.names:
            (shared / name).symlink_to(victim)
            os.symlink(tmp_path / "made", shared / f"dangling{name}")

    assert as_another_user(theirs) == "done"
    for name in ("x", "dangling.x"):
        for enter in (sole_writer(shared / name), one_at_a_time(shared / name)):
            if (shared / f".{name}.part").is_symlink():
                with pytest.raises(UserError, match="is a link"), enter:
                    pass
    with pytest.raises(UserError, match="is a link"), locked(shared):
        pass
    for name in ("x.log", "danglingx.log"):
        with pytest.raises(UserError, match="is a link"):
            open_log(shared / name)
    for name in ("x.txt", "danglingx.txt"):
        write_text(shared / name, "mine")
        assert (shared / name).read_text() == "mine" and not (shared / name).is_symlink()
    assert victim.read_text() == "precious" and not (tmp_path / "made").exists()


@needs_root
def test_two_users_of_a_folder_are_kept_apart_and_not_shut_out(shared, protected):
    def lock() -> None:
        with locked(shared):
            pass

    with locked(shared):
        assert as_another_user(lock).startswith(InUseError.__name__)
    assert as_another_user(lock) == "done"  # the file that the first has left is no obstacle
    with locked(shared):
        pass

    def change() -> None:
        with one_at_a_time(shared / "file"):
            pass
        with sole_writer(shared / "made") as temporary:
            if temporary is not None:
                temporary.write_text("theirs")
        with atomic_folder(shared / "folder") as folder:
            (folder / "a").write_text("theirs")

    with one_at_a_time(shared / "file"):
        pass
    assert as_another_user(change) == "done"
    assert (shared / "made").read_text() == (shared / "folder" / "a").read_text() == "theirs"
    with sole_writer(shared / "made") as temporary:
        assert temporary is None


@needs_root
def test_a_manifest_has_the_entries_of_two_users(protected):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o777)
        entry = TaskEntry("0" * 64, {}, 1, 1, {}, True)
        write_entry(root, "ours", entry)
        assert as_another_user(lambda: write_entry(root, "theirs", entry)) == "done"
        assert read_entry(root, "ours") == read_entry(root, "theirs") == entry
        drop_entry(root, "theirs")
        assert read_entry(root, "theirs") is None


@needs_root
def test_what_is_being_written_is_not_lost_to_another_user(shared):
    """Another user's file under the same name is replaced only where the system lets us."""

    def theirs() -> None:
        with atomic_path(shared / "file") as temporary:
            temporary.write_text("theirs")

    write_text(shared / "file", "ours")
    answer = as_another_user(theirs)
    sticky = bool(shared.stat().st_mode & stat.S_ISVTX)
    assert (answer == "done") != sticky and (shared / "file").read_text() == ("ours" if sticky else "theirs")
    assert [file.name for file in shared.iterdir()] == ["file"]
