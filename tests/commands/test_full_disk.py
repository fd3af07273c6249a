"""A disk that takes no more: every command says so in one line, with code 2, and leaves no half file under its name."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import runs
from PIL import Image

from mambapeft_vision.cli import main
from mambapeft_vision.run.exit import USER_MISTAKE, _code_of

LEAST = 64  # bytes that the limit leaves to each file

# Command → its arguments for a finished run, a folder to write to and a tree of images.
COMMANDS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "evaluate": lambda run, out, tree: ["evaluate", f"run={run}", "device=cpu"],
    "tables": lambda run, out, tree: ["tables", str(run), "--out", str(out / "t.md")],
    "tables html": lambda run, out, tree: ["tables", str(run), "--format", "html", "--out", str(out / "t.html")],
    "tables all": lambda run, out, tree: ["tables", str(run), "--all", str(out / "all")],
    "report": lambda run, out, tree: ["report", str(run), "--out", str(out / "report")],
    "merge to pth": lambda run, out, tree: ["convert", "merge", str(run), *RANDOM, "--out", str(out / "m.pth")],
    "merge": lambda run, out, tree: ["convert", "merge", str(run), *RANDOM, "--out", str(out / "m.safetensors")],
    "to-hub": lambda run, out, tree: ["convert", "to-hub", str(run), "--out", str(out / "hub")],
    "import": lambda run, out, tree: [*["prepare", "mini", "import"], str(tree), "--name", "t", "--out", str(out)],
    "rerun": lambda run, out, tree: ["rerun", str(run / "result.json"), f"paths.outputs={out / 'again'}"],
}
RANDOM = "--weights", "random"


@pytest.fixture(autouse=True)
def as_run_cli_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    task = runs.lay_out_task(folder / "task")
    runs.run(runs.overrides(task, folder / "out", "trainer.max_epochs=1", "paths.cache=null"))
    return runs.only_run_folder(folder / "out")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 images of two classes."""
    folder = tmp_path_factory.mktemp("tree")
    for number in range(1200):
        pixels = np.full((2, 2, 3), number % 251, dtype=np.uint8)
        pixels[0, 0] = number // 251, number % 7, number % 5
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


@contextmanager
def size_limit(bytes_: int) -> Iterator[None]:
    """No file of this process may become larger, whoever writes it: EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A real one, of which nothing is left. Mounting takes rights that not every machine gives."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"NOT RUN: no disk can be mounted here ({mounted.stderr.decode().strip()})")
    try:
        with open(folder / "ballast", "wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                pass
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def check(arguments: Sequence[str], reason: str, out: Path, said: pytest.CaptureFixture[str]) -> None:
    said.readouterr()
    code = _code_of(partial(main, arguments))
    error = said.readouterr().err
    assert code == USER_MISTAKE and reason in error and "Traceback" not in error, error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1, error
    assert not [f for f in out.rglob("*") if f.is_file() and f.name != "ballast" and f.stat().st_size > LEAST]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_file_of_this_size(
    name: str, finished: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f: f.read_bytes() for f in finished.iterdir() if f.is_file()}
    with size_limit(LEAST):
        check(COMMANDS[name](finished, tmp_path, tree), os.strerror(27), tmp_path, capsys)
    assert {f: f.read_bytes() for f in finished.iterdir() if f.is_file()} == before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: needs Linux's tmpfs")
def test_no_space_left(finished: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(tmp_path):
        for name in COMMANDS:
            if name != "evaluate":  # which writes into the run's folder
                check(COMMANDS[name](finished, tmp_path, tree), os.strerror(28), tmp_path, capsys)
