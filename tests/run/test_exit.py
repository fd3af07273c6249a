"""How commands end where the disk, the terminal or the system gives way."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import faults, runs
from helpers.fake_records import fake_record
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf

from mambapeft_vision.commands import train as command
from mambapeft_vision.results.record import is_finished, read_record
from mambapeft_vision.run.exit import (
    CRASH,
    NO_READER,
    USER_MISTAKE,
    describe_error,
    is_mistake,
    job,
    run_cli,
)
from mambapeft_vision.run.overrides import prepare_multirun
from mambapeft_vision.run.run import train
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import INTERRUPTED, UserError
from mambapeft_vision.utils.startup import drop_unusable_backend

FULL = Path("/dev/full")


@pytest.fixture
def task(tmp_path):
    return runs.lay_out_task(tmp_path / "task")


def short(task: Path, outputs: Path, *more: str) -> list[str]:
    return runs.overrides(task, outputs, "trainer.max_epochs=1", "paths.cache=null", *more)


def code_of(main) -> int:
    with pytest.raises(SystemExit) as end:
        run_cli(main)
    return end.value.code


@pytest.mark.skipif(not FULL.exists(), reason="NOT RUN: needs Linux's /dev/full")
def test_a_run_whose_output_is_full_ends_well(task, tmp_path):
    command = [sys.executable, str(runs.ROOT / "train.py"), *short(task, tmp_path / "out")]
    with FULL.open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=full, cwd=tmp_path, timeout=300)
    assert ended.returncode == 0
    assert is_finished(runs.only_run_folder(tmp_path / "out"))


@pytest.mark.skipif(not FULL.exists(), reason="NOT RUN: needs Linux's /dev/full")
def test_what_is_printed_for_people_to_keep_is_missed(tmp_path):
    """A table that went nowhere is no success."""
    script = "import sys; from mambapeft_vision.run.exit import run_cli\nrun_cli(lambda: print('x' * 100_000))"
    with FULL.open("w") as full:
        ended = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == USER_MISTAKE
    assert ended.stderr.startswith("error: the output: No space left on device; free some space")


def test_a_reader_that_has_gone_is_no_error():
    script = "from mambapeft_vision.run.exit import run_cli\nrun_cli(lambda: [print('x' * 100) for _ in range(10_000)])"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == NO_READER
    assert process.stderr.read() == ""


def test_a_picture_that_fails_costs_no_result(task, tmp_path, monkeypatch, capsys):
    def draw(*_: object, **__: object) -> None:
        raise MemoryError("too many classes")

    monkeypatch.setattr("mambapeft_vision.results.pictures.page_of_predictions", draw)
    record = runs.run(short(task, tmp_path / "out", "trainer.picture=true"))
    folder = runs.only_run_folder(tmp_path / "out")
    assert read_record(folder) == record
    assert "predictions.png: MemoryError: too many classes" in capsys.readouterr().err
    assert (folder / "confusion.png").is_file()


def test_a_folder_where_a_file_belongs_is_found_before_the_training(task, tmp_path):
    command = short(task, tmp_path / "out", "dry_run=false")
    with pytest.raises(RuntimeError, match="stop"):
        runs.run(command, faults.raises(RuntimeError("stop"), 1))
    (runs.only_run_folder(tmp_path / "out") / "result.json").mkdir()
    with pytest.raises(UserError, match=r"result\.json is a folder; expected a file"):
        runs.run(command)


def test_a_run_whose_folder_is_deleted_says_so(task, tmp_path):
    with pytest.raises(UserError, match="was deleted while the run was at work in it; start it again"):
        runs.run(short(task, tmp_path / "out"), faults.InStep(2, lambda: shutil.rmtree(tmp_path / "out")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_errors_of_a_write_name_the_file(tmp_path, monkeypatch, number):
    def fail(descriptor: int) -> None:
        raise OSError(number, "as the system says")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "table.md", "text")
    assert is_mistake(caught.value)
    assert describe_error(caught.value).startswith(f"error: {tmp_path}/table.md: as the system says; ")
    assert not list(tmp_path.iterdir())


def test_a_current_folder_that_is_no_more_is_named(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert code_of(os.getcwd) == code_of(lambda: write_text("table.md", "text")) == USER_MISTAKE
    assert capsys.readouterr().err.count("error: the current folder has been deleted; change to one that is there") == 2


def test_errors_that_no_table_knows_are_one_line():
    assert describe_error(FileNotFoundError(errno.ENOENT, "No such file", "a/b")) == "error: a/b: No such file (ENOENT)"
    assert describe_error(KeyError("x")) == "KeyError: 'x'"  # of one that was raised, with its traceback


def test_the_traceback_of_a_crash_is_in_a_file(tmp_path, monkeypatch, capsys):
    """On the terminal it is a line; where no file can be written, the traceback."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert code_of(lambda: 1 / 0) == CRASH
    (file,) = tmp_path.iterdir()
    line = (
        f"error: ZeroDivisionError: division by zero; a fault of this program or of the machine. Its traceback: {file}"
    )
    assert capsys.readouterr().err == line + "\n" and "1 / 0" in file.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert code_of(lambda: 1 / 0) == CRASH
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_that_an_import_turns_into_another_error():
    """numpy's lazy imports end in a RecursionError."""

    def main() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError from None

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert code_of(main) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    assert code_of(lambda: 1 / 0) == CRASH


@pytest.mark.parametrize("module", ["pydantic", "hydra", "torch", "lightning", "mambapeft_vision.run.exit"])
def test_ctrl_c_while_modules_are_imported(tmp_path, module):
    script = f"""
import signal, sys

class CtrlC:
    def find_spec(name, *_):
        if name == {module!r}:
            sys.meta_path.remove(CtrlC)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, CtrlC)
sys.argv[1:] = ["dry_run=true"]
from mambapeft_vision.cli import run
run("train")
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=runs.heed_ctrl_c)
    assert ended.returncode == INTERRUPTED and "Traceback" not in ended.stderr, ended.stderr


def test_a_key_that_hydra_cannot_read_is_named_as_the_key():
    with pytest.raises(OverrideParseException) as caught:
        OverridesParser.create().parse_overrides(["+method.9a.rank=2"])
    assert "+method.9a.rank is no key; expected names" in describe_error(caught.value)


@pytest.mark.parametrize("value", ["sp/a=b", "a b", "a,b:c", "~/task"])
def test_hydras_grammar_is_translated(value):
    key = "dataset.folder"
    try:
        parsed = OverridesParser.create().parse_overrides([f"{key}={value}"])[0].value()
        assert parsed == value or value == "a,b:c"  # which Hydra takes for a choice
    except OverrideParseException as error:
        message = describe_error(error)
        assert "mismatched" not in message and f"""'{key}="{value}"'""" in message


def test_a_comma_in_a_path_is_told_how_to_quote(tmp_path, monkeypatch):
    """Hydra takes it for a choice of values."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigCompositionException) as caught:
        runs.compose_train(["dataset.folder=sp/a,b"])
    message = describe_error(caught.value)
    assert message.startswith("error: dataset.folder=sp/a,b is a choice") and "\n" not in message
    assert """'dataset.folder="sp/a,b"'""" in message


def test_the_home_folder_is_written_out(tmp_path):
    words = prepare_multirun(["-m", 'paths.outputs="~/o"', "seed=1,2"], runs.CONFIGS)
    assert f"paths.outputs={Path.home()}/o" in words


@pytest.mark.parametrize(
    ("value", "kept"), [("nonsense", False), ("module://no.such.backend", False), ("", True), ("SVG", True)]
)
def test_a_backend_of_matplotlib_that_is_not_there_is_forgotten(monkeypatch, value, kept):
    """Importing matplotlib, and with it Lightning, fails on it."""
    monkeypatch.setenv("MPLBACKEND", value)
    drop_unusable_backend()
    assert ("MPLBACKEND" in os.environ) == kept


# What notebooks, clusters, containers and cron jobs set, or leave out (None).
VARIABLES: dict[str, str | None] = {
    **dict.fromkeys(("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"), "/proc/nowhere"),
    **dict.fromkeys(("COLUMNS", "HYDRA_FULL_ERROR", "SLURM_PROCID", "SLURM_LOCALID", "RANK", "LOCAL_RANK"), "0"),
    **dict.fromkeys(("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NNODES", "WORLD_SIZE"), "4"),
    **dict.fromkeys(("HOME", "USER", "LC_ALL")),
    "OMP_NUM_THREADS": "abc",
    "WANDB_MODE": "nonsense",
    "CUDA_VISIBLE_DEVICES": "",
    "TERM": "dumb",
    "LANG": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONWARNINGS": "error",
    "SLURM_JOB_NAME": "job",
    "MPLBACKEND": "module://matplotlib_inline.no_such_backend",
    "NO_COLOR": "1",
}


@pytest.mark.exhaustive  # a process of its own: most of the variables count while modules are imported
def test_variables_of_notebooks_and_clusters_end_nothing(task, tmp_path):
    given = {**os.environ, **{name: value for name, value in VARIABLES.items() if value is not None}}
    environment = {name: value for name, value in given.items() if VARIABLES.get(name, "") is not None}
    words = short(task, tmp_path / "out", "trainer.picture=true")
    command = [sys.executable, str(runs.ROOT / "train.py"), *words]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    folder = runs.only_run_folder(tmp_path / "out")
    assert (folder / "predictions.png").is_file()
    there = read_record(folder)
    here = runs.run(short(task, tmp_path / "here"))
    assert there.loss == pytest.approx(here.loss, rel=1e-3)


def test_torchrun_is_told_what_to_do(task, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match=r"trainer\.devices=N"):
        train(runs.compose_train(short(task, tmp_path)))


def test_images_without_the_channels_of_the_backbone_are_named(task, tmp_path):
    with pytest.raises(UserError, match=r"000000\.png.*3 channels \(RGB\); the backbone takes 4"):
        runs.run(["backbone.weights=random", *short(task, tmp_path, "+backbone.in_chans=4")])


def test_a_folder_with_a_reference_for_a_name_is_refused_before_training(task, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.folder=.*Rename"):
        runs.run(short(task.rename(tmp_path / "x"), tmp_path / "out", r"dataset.folder='\${HOME}'"))


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_a_sweeper_gets_the_accuracy(monkeypatch, mode):
    """Sweepers that search (Optuna, Ax, Nevergrad) maximise what a job returns."""
    hydra = {"mode": mode, "overrides": {"task": ["seed=1"]}, "job": {"num": 0}}
    jobs = []
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(hydra))
    monkeypatch.setattr("mambapeft_vision.run.run.train", lambda *_, **__: fake_record("vtab/cifar", "a", 1, 0.625))
    monkeypatch.setattr("mambapeft_vision.commands.train.run_app", lambda _, train, __: jobs.append(job(train)))
    command.main(["seed=1"])
    assert jobs[0](OmegaConf.create({"pretrain": None, "dry_run": True})) == 0.625
