"""Two workers on one study in a PostgreSQL database, as on many machines. Needs a PostgreSQL server's programs."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import runs
from optuna.trial import TrialState

from mambapeft_vision.search.command import parse
from mambapeft_vision.search.search import open_study
from mambapeft_vision.utils.errors import UserError

DEFAULTS = {"space": "hybrid_step1", "trials": "3", "protocol": "validation"}


def programs() -> Path | None:
    """The folder with initdb and pg_ctl; Debian's is not on the PATH."""
    found = [Path(path).parent for path in (shutil.which("initdb"),) if path]
    found += [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return found[-1] if found else None


@pytest.fixture
def database() -> Iterator[str]:
    """URL of a new server's database."""
    pytest.importorskip("psycopg", reason='PostgreSQL NOT TESTED: needs pip install -e ".[cluster]"')
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL NOT TESTED: no initdb here (Debian: apt install postgresql)")
    user = "postgres" if os.getuid() == 0 else None  # the server refuses to be root's
    home = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path must be short
    if user is not None:
        shutil.chown(home, user)

    def call(program: str, *arguments: str) -> None:
        command = [str(folder / program), "-D", str(home / "data"), *arguments]
        subprocess.run(command, check=True, user=user, cwd=home, stdout=subprocess.DEVNULL)

    try:
        call("initdb", "-U", "study", "--auth=trust", "-N")
        options = f"-c listen_addresses='' -c unix_socket_directories='{home}' -c fsync=off"
        call("pg_ctl", "-w", "-l", str(home / "log"), "-o", options, "start")
        yield f"postgresql://study@/postgres?host={home}"
    finally:
        if (home / "data" / "postmaster.pid").exists():
            call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(home)


def arguments(data: Path, *more: str) -> list[str]:
    command = [*runs.SMALL_BACKBONE, "dataset=folder", "dataset.name=custom/one", f"dataset.num_classes={runs.CLASSES}"]
    command += [f"dataset.folder={data}", "trainer.max_epochs=1", "trainer.warmup_epochs=0", "trainer.device=cpu"]
    return [*command, *more]


@pytest.mark.slow
def test_two_workers_share_a_study_in_postgresql(tmp_path, monkeypatch, database):
    monkeypatch.chdir(tmp_path)
    task = runs.lay_out_task(tmp_path / "task")
    lines = (task / "train800val200.txt").read_text().splitlines(keepends=True)
    (task / "train800.txt").write_text("".join(lines[:30]))
    (task / "val200.txt").write_text("".join(lines[30:]))
    command = arguments(task, "trials=12", f"storage={database}")
    script = str(runs.ROOT / "scripts" / "search_hybrid.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, script, *command], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = [worker.communicate(timeout=400)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    trials = open_study(parse(command, runs.CONFIGS, DEFAULTS, tuned=False)).trials
    assert 12 <= len(trials) <= 13  # both may begin the last one
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert len({trial.user_attrs["worker"][1] for trial in trials}) == 2


def test_a_database_that_is_not_there_is_named_without_its_password(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda _: None)
    pytest.importorskip("psycopg", reason='needs pip install -e ".[cluster]"')
    url = f"postgresql://me:secret@/study?host={tmp_path}"
    with pytest.raises(UserError, match=r"storage=postgresql\+psycopg://me:\*\*\*@/study.*expected the URL") as caught:
        open_study(parse(arguments(tmp_path, f"storage={url}"), runs.CONFIGS, DEFAULTS, tuned=False))
    assert "secret" not in str(caught.value)
