"""A disk that takes no more: every command says so in one line, with code 2, and leaves no half file under its name."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import runs
from helpers.fake_records import fake_record
from helpers.file_size import size_limit
from helpers.run_files import result_of
from PIL import Image

from mambapeft_vision.cli import main
from mambapeft_vision.data.prepare.published import FEW_SHOT, FGVC, SEEDS, SHOTS, Published
from mambapeft_vision.data.tasks import TASKS, Task
from mambapeft_vision.results.bundle import write_bundle
from mambapeft_vision.run.exit import USER_MISTAKE, code_of

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
    "predict": lambda run, out, tree: [
        "predict",
        f"run={run}",
        f"images={tree / 'a' / '1*.png'}",
        "--out",
        str(out / "p.csv"),
    ],
    "explore": lambda run, out, tree: ["explore", str(run), "--out", str(out / "e.html")],
    "ensemble": lambda run, out, tree: ["ensemble", f"runs={run},{run.with_name(SECOND)}", "--out", str(out)],
    "interpolate": lambda run, out, tree: [
        *["interpolate", str(run), "--alpha", "0.5", "--alphas", "0,1", "--split", "test"],
        *["--device", "cpu", "--out", str(out)],
    ],
    "to timm": lambda run, out, tree: ["export", f"run={run}", "to=timm", *RANDOM, "--out", str(out / "timm")],
    "to official": lambda run, out, tree: ["export", f"run={run}", "to=official", *RANDOM, "--out", str(out / "o.pth")],
    "to torch-export": lambda run, out, tree: [
        *["export", f"run={run}", "to=torch-export", *RANDOM, "--out", str(out / "o.pt2")]
    ],
    "to peft": lambda run, out, tree: ["export", f"run={run}", "to=peft", *RANDOM, "--out", str(out / "peft")],
    "to lora": lambda run, out, tree: ["export", f"run={run}", "to=lora", *RANDOM, "--out", str(out / "lora")],
    "train -m": lambda run, out, tree: ["train", "-m", *tiny(run, out), "seed=5,6"],
    "tune": lambda run, out, tree: ["tune", *tiny(run, out), "method=lora_p_x", "trials=2"],
    "pretrain": lambda run, out, tree: [
        *["pretrain", "folder", f"sources.mine.path={tree}", "sources.mine.holdout=0.01", f"out={out / 'weights'}"],
        *["steps=1", "batch_size=2", "precision=fp32", "device=cpu", "workers=1"],
        *["+architecture.embed_dim=16", "+architecture.depth=1", "+architecture.img_size=16"],
    ],
    "rerun": lambda run, out, tree: ["rerun", str(run / "result.json"), f"paths.outputs={out / 'again'}"],
    "to onnx": lambda run, out, tree: ["export", f"run={run}", "to=onnx", *RANDOM, "--out", str(out / "o.onnx")],
    "explain": lambda run, out, tree: [
        *["explain", f"run={run}", f"image={tree / 'a' / '0.png'}", "--grid", "2", "--out", str(out / "e.png")]
    ],
    "reproduce": lambda run, out, tree: [
        *["reproduce", *tiny(run, run.parents[3]), "method=lora_p_x", "--report", str(out / "r.html")]
    ],
    "vtab1k": lambda run, out, tree: [
        *["prepare", "vtab1k", "--folder", str(run.parents[4]), "--tasks", "task", "--root", str(out / "vtab")],
        *["--workers", "1"],
    ],
    "fgvc": lambda run, out, tree: ["prepare", "fgvc", "cars", *published(tree), "--root", str(out / "fgvc")],
    "few-shot": lambda run, out, tree: ["prepare", "few-shot", "pets", *published(tree), "--root", str(out / "few")],
    "generate": lambda run, out, tree: ["prepare", "mini", "generate", "--out", str(out / "mini")],
    "mini pack": lambda run, out, tree: ["mini", "pack", bundle(tree), "--out", str(out / "a.runs.json")],
    "mini unpack": lambda run, out, tree: ["mini", "unpack", bundle(tree), "--out", str(out / "unpacked")],
    "mini document": lambda run, out, tree: ["mini", "document", bundle(tree), "--out", str(out / "d.md")],
    "mini recipe": lambda run, out, tree: [
        *["mini", "recipe", "--methods", "linear_probe", "--tasks", "mini/digits", "--seeds", "0", "--workers", "1"],
        *["trainer.max_epochs=1", "trainer.warmup_epochs=0", "trainer.device=cpu", "paths.cache=null"],
        *[f"paths.outputs={out / 'o'}", f"paths.data={out / 'data'}"],
    ],
    "mini compare": lambda run, out, tree: ["mini", "compare", bundle(tree), "--out", str(out / "c.md")],
}
SAID = {"vtab1k": "bytes, but only 0 are free"}  # instead of the system's word, where the space is counted beforehand
LONG = ("to onnx", "mini recipe")
RECORDING = (
    "train -m",
    "tune",
    "reproduce",
    "mini recipe",
    "generate",
)  # they note a failed run in its folder, or need no input


def tiny(run: Path, out: Path) -> list[str]:
    """Overrides of runs on the task of a finished run."""
    return runs.overrides(run.parents[4] / "task", out, "trainer.max_epochs=1", "paths.cache=null")


SECOND = "seed1-copy"
RANDOM = "--weights", "random"


def published(tree: Path) -> list[str]:
    """Options for lists that `tree` lays beside its images."""
    return ["--lists", str(tree.parent / "lists"), "--images", str(tree)]


def bundle(tree: Path) -> str:
    return str(tree.parent / "vim_nano.runs.json")


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published data sets have two classes, and one of VTAB-1K's tasks is that of the finished run."""
    monkeypatch.setitem(FGVC, "cars", Published("cars", 2, {}))
    monkeypatch.setitem(FEW_SHOT, "pets", Published("pets", 2, {}))
    monkeypatch.setitem(TASKS, "task", Task("task", "natural", runs.CLASSES, runs.TEST_IMAGES))


@pytest.fixture(autouse=True)
def as_run_cli_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.chdir(tmp_path)  # where a search keeps what it finds


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    task = runs.lay_out_task(folder / "task")
    runs.run(runs.overrides(task, folder / "out", "trainer.max_epochs=1", "paths.cache=null"))
    lines = (task / "train800val200.txt").read_text().splitlines(keepends=True)
    (task / "train800.txt").write_text("".join(lines[:30]))
    (task / "val200.txt").write_text("".join(lines[30:]))
    run = runs.only_run_folder(folder / "out")
    shutil.copytree(run, run.with_name(SECOND))
    result = run.with_name(SECOND) / "result.json"
    record = result_of(result)
    result.write_text(json.dumps(record | {"seed": 1, "fingerprint": "0" * len(record["fingerprint"])}))
    return run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 images of two classes; beside them published lists of the first ones, and results of the mini benchmark."""
    above = tmp_path_factory.mktemp("beside")
    folder = above / "tree"
    for number in range(1200):
        pixels = np.full((2, 2, 3), number % 251, dtype=np.uint8)
        pixels[0, 0] = number // 251, number % 7, number % 5
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    (above / "lists").mkdir()
    names = [f"{'ab'[number % 2]}/{number}.png" for number in range(6)]
    for split, pair in {"train": names[:2], "val": names[2:4], "test": names[4:]}.items():
        (above / "lists" / f"{split}.json").write_text(json.dumps(dict(zip(pair, (0, 1)))))
        lists = [f"train_meta.list.num_shot_{shots}.seed_{seed}" for shots in SHOTS for seed in SEEDS]
        for name in lists if split == "train" else [f"{split}_meta.list"]:
            (above / "lists" / name).write_text("".join(f"{path} {label}\n" for label, path in enumerate(pair)))
    backbone = {"name": "vim_nano_patch8_64"}
    records = [fake_record("mini/usps", preset, 0, 0.7, backbone=backbone) for preset in ("lora_p_x", "linear_probe")]
    write_bundle(Path(bundle(folder)), records)
    return folder


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
    code = code_of(partial(main, arguments))
    error = said.readouterr().err
    assert code == USER_MISTAKE and reason in error and "Traceback" not in error, error
    assert "error: the output:" not in error, "no file is named"
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1, error
    assert not [f for f in out.rglob("*") if f.is_file() and f.name != "ballast" and f.stat().st_size > LEAST]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in LONG else name for name in COMMANDS]
)
def test_no_file_of_this_size(
    name: str, finished: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f: f.read_bytes() for f in finished.iterdir() if f.is_file()}
    with size_limit(LEAST):
        check(COMMANDS[name](finished, tmp_path, tree), os.strerror(27), tmp_path, capsys)
    assert {f: f.read_bytes() for f in finished.iterdir() if f.is_file()} == before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", [*(name for name in COMMANDS if name not in RECORDING), "from-peft", "from-reference"])
def test_a_refused_command_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the run nor the images are there: no empty folder is made for the output."""
    away, out = tmp_path / "away", tmp_path / "here"
    away.mkdir()
    monkeypatch.chdir(away)
    run = away / "out" / "custom" / "tiny" / "lora" / "seed0"
    new = str(out / "deep" / "new")
    others = {
        "from-peft": ["from-peft", str(away / "peft"), "--backbone", "vim_pico_patch8_32", *RANDOM, "--out", new],
        "from-reference": ["from-reference", str(away / "c.py"), str(away / "c.pth"), *RANDOM, "--out", new],
    }
    arguments = ["convert", *others[name]] if name in others else COMMANDS[name](run, out / "deep", away / "tree")
    assert code_of(partial(main, arguments)) == USER_MISTAKE
    assert not list(tmp_path.rglob("*"))[1:]


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: needs Linux's tmpfs")
def test_no_space_left(
    finished: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(tmp_path):
        monkeypatch.chdir(tmp_path)  # the mounted one
        for name in COMMANDS:
            if name != "evaluate" and name not in LONG:  # evaluate writes into the run's folder
                reason = SAID.get(name, os.strerror(28))
                check(COMMANDS[name](finished, tmp_path, tree), reason, tmp_path, capsys)
