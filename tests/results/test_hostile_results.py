"""Results that others sent are data: refused in one message or shown as text, within bounds of time and memory."""

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_records import CONFIGS, fake_record
from PIL import Image

from mambapeft_vision.commands.sync import main as sync
from mambapeft_vision.data.prepare.importer import read_tree
from mambapeft_vision.results import plots
from mambapeft_vision.results.bundle import read_bundle
from mambapeft_vision.results.layout import file_name
from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.results.predictions import read_labels
from mambapeft_vision.results.record import read_record
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import (
    collect,
    find_records,
    read_standard,
    summary_table,
    to_csv,
    to_latex,
    to_markdown,
    to_text,
)
from mambapeft_vision.sweep.estimates import COLUMNS as RATE_COLUMNS
from mambapeft_vision.sweep.estimates import read_rates
from mambapeft_vision.utils.errors import UserError

SECONDS, BYTES = 30, 2**30


def within_bounds(function) -> str:
    """What `function` says when it refuses, in a process that may take 30 s of CPU and 1 GiB more than this one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.alarm(10 * SECONDS)  # for what waits and computes nothing
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
            try:
                function()
                said = "accepted"
            except UserError as error:
                said = f"refused: {error}"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writing, said.encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(child, 0)
    return said or f"ended by signal {os.WTERMSIG(status)}"


def written(folder: Path, **changes) -> Path:
    content = asdict(fake_record("vtab/cifar", "a", 0, 0.5)) | changes
    (folder / "result.json").write_text(json.dumps(content))
    return folder


def config(**changes) -> dict:
    return fake_record("vtab/cifar", "a", 0, 0.5).config | changes


def a_device(folder: Path) -> None:
    (folder / "result.json").symlink_to("/dev/zero")


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "result.json")


def a_sparse_file(folder: Path) -> None:
    with open(folder / "result.json", "wb") as file:
        file.truncate(2**33)


def deep(folder: Path) -> None:
    (folder / "result.json").write_text("[" * 200_000)


def deep_config(folder: Path) -> None:
    nested = "[" * 500 + "]" * 500
    text = json.dumps(asdict(fake_record("vtab/cifar", "a", 0, 0.5)))
    (folder / "result.json").write_text(text.replace('"method": {', f'"method": {{"x": {nested}, ', 1))


RECORDS = {
    "a device": (a_device, "is a link"),
    "a pipe": (a_pipe, "a device, pipe or socket"),
    "a sparse file": (a_sparse_file, "expected at most"),
    "deep": (deep, "nested too deeply"),
    "deep config": (deep_config, "nested too deeply"),
    "a list": (lambda f: (f / "result.json").write_text("[]"), "expected an object"),
    "not text": (lambda f: (f / "result.json").write_bytes(b"\xff\xfe{"), "is not UTF-8"),
    "no sections": (lambda f: written(f, config={}), "config.backbone"),
    "endless message": (lambda f: written(f, config=["x"] * 1_000_000), "config=["),
    "a path as task": (lambda f: written(f, task="../../../x"), "task="),
    "a long task": (lambda f: written(f, task="x" * 300), "task="),
    "a path as method": (lambda f: written(f, methods=["../x"]), "methods:"),
    "a path in the config": (lambda f: written(f, config=config(method={"/tmp/x": {}})), "config.method."),
    "a sweep that is no text": (lambda f: written(f, config=config(sweep=["x"])), "config.sweep="),
    "escapes in a key": (lambda f: written(f, **{"\x1b[2J": 1}), "\\x1b[2J is unknown"),
    "a rate that is no number": (lambda f: written(f, config=config(trainer={"learning_rate": []})), "learning_rate"),
    "infinite": (lambda f: (f / "result.json").write_text('{"schema_version": 1e999}'), "schema_version is inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_refused_in_one_message(tmp_path, name):
    make, expected = RECORDS[name]
    make(tmp_path)
    for read in (lambda: read_record(tmp_path), lambda: find_records([tmp_path])):
        said = within_bounds(read)
        assert said.startswith("refused: ") and expected in said and len(said) < 3_000, said[:500]
        assert said.isprintable()


BUNDLES = {
    "many empty runs": '{"format":1,"columns":[],"values":{},"common":{},"runs":[' + "[]," * 300_000 + "[]]}",
    "a list": "[]",
    "deep": "[" * 200_000,
    "places that are no numbers": '{"format":1,"columns":["a"],"values":{"a":[1]},"common":{},"runs":[[[]]]}',
    "columns that are no names": '{"format":1,"columns":[[]],"values":{"a":[1]},"common":{},"runs":[[1]]}',
    "runs that are a number": '{"format":1,"columns":[],"values":{},"common":{},"runs":3}',
    "common that is a list": '{"format":1,"columns":[],"values":{},"common":[],"runs":[[]]}',
    "long shared text": json.dumps(
        {"format": 1, "columns": ["seed"], "values": {}, "runs": [[n] for n in range(1000)],
         "common": {"schema_version": 1, "config": {}, "x": "y" * 10**7}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles_are_refused_in_one_message(tmp_path, name):
    file = tmp_path / "x.runs.json"
    file.write_text(BUNDLES[name])
    said = within_bounds(lambda: read_bundle(file))
    assert said.startswith("refused: ") and str(file) in said and len(said) < 1_000, said[:500]


@pytest.mark.parametrize(
    "content",
    [
        "", "epoch,loss\n", "loss\n1\n", "epoch,loss\n0\n", "epoch,loss\n0,text\n", "epoch,loss\n0,nan\n",
        "epoch,loss\n0," + "1" * 200_000, "epoch,loss\n0,1,2\n", "epoch,loss\n0,\x001\n", b"\xff\xfe",
        "epoch,loss\n" + "0,1\n" * 10_000_000, "epoch,loss\r" + "0,1\r" * 10_000_000,
        "epoch" + ",a" * 1_000_000 + "\n0" + ",1" * 1_000_000,
    ],
    ids=range(13),
)  # fmt: skip
def test_metrics_are_read_or_refused(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = within_bounds(lambda: read_metrics(tmp_path))
    assert said.startswith("refused: ") or (said == "accepted" and content in ("", "epoch,loss\n"))
    drawn = plots.drawn("curves", lambda: plots.training_curves({"run": tmp_path}))  # a picture at most less
    assert drawn is None or said == "accepted"


def an_npz(folder: Path, **members: bytes) -> None:
    with zipfile.ZipFile(folder / "predictions.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def header(dtype: str, shape: tuple) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


LABELS = header("<i8", (2,)) + np.array([0, 1]).tobytes()
MANY = 12_000_000
PREDICTIONS = {
    "nothing": b"",
    "no array": b"x" * 100,
    "empty items": header("|V0", (20_000_000,)),
    "a shape of its own": header("<i8", (10**12,)) + b"\0" * 100,
    "a bomb": header("<i8", (2**23,)) + b"\0" * 2**26,
    "objects": header("|O", (2,)) + b"cos\nsystem\n",
    "floats": header("<f8", (2,)) + b"\0" * 16,
    "a matrix": header("<i8", (1, 2)) + b"\0" * 16,
    "negative": header("<i8", (2,)) + np.array([-1, 1]).tobytes(),
    "huge classes": header("<i8", (2,)) + np.array([1, 2**40]).tobytes(),
    "another length": header("<i8", (1,)) + b"\0" * 8,
    "many": header("|u1", (MANY,)) + bytes(MANY),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_are_refused_in_one_message(tmp_path, name):
    an_npz(tmp_path, predicted=PREDICTIONS[name], labels=LABELS)
    said = within_bounds(lambda: read_labels(tmp_path))
    assert said.startswith("refused: ") and len(said) < 1_000, said[:500]


def test_predictions_that_are_right_are_read(tmp_path):
    an_npz(tmp_path, predicted=LABELS, labels=LABELS)
    predicted, labels = read_labels(tmp_path)
    assert predicted.tolist() == labels.tolist() == [0, 1]


def test_folders_in_folders_without_end_are_refused(tmp_path):
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1_200):  # deeper than a path can name and than Python calls itself
        os.mkdir("a", dir_fd=place)
        inner = os.open("a", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    for read in (lambda: find_records([tmp_path]), lambda: read_tree(tmp_path), lambda: sync([str(tmp_path)])):
        assert "refused" in within_bounds(read)
    subprocess.run(["rm", "-r", str(tmp_path / "a")], check=True)  # which Python's own rmtree cannot


RATES = ",".join(RATE_COLUMNS) + "\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"a,b\n", *(RATES.encode() + row for row in (
        b"x", b"x" * 200_000, b"vim_s,*,1,inf", b"vim_s,*,nan,1", b"vim_s,\x1b[2J,1,1", b"vim_s,*,1,1,1,1,,,x,0"))],
    ids=range(9),
)  # fmt: skip
def test_rates_are_read_or_refused(tmp_path, content):
    (tmp_path / "rates.csv").write_bytes(content)
    said = within_bounds(lambda: read_rates(tmp_path / "rates.csv", {}))
    assert said.startswith("refused: ") == (b",1,1,1" not in content) and said.isprintable()


# What is shown

INJECTED = "a|b\n<img src=x onerror=alert(1)>\n\x1b[2J\u202e\\input{x}\\immediate\\write18{y} & # $\\xxxxx$ [l](u)"


@pytest.fixture(scope="module")
def collection():
    record = fake_record("vtab/cifar", "a", 0, 0.5, backbone={"name": INJECTED}, device_name=INJECTED)
    other = fake_record("vtab/cifar", "a", 0, 0.5, backbone={"name": INJECTED}, trainer={"precision": INJECTED})
    (found,) = collect([record, replace(other, seed=1, task="vtab/dtd")], read_standard(CONFIGS))
    return found


def test_markdown_keeps_its_columns(collection):
    text = to_markdown(summary_table(collection))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(collection.rows)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(summary_table(collection).header) + 1}
    assert "<img" not in text and text.replace("\n", "").isprintable()
    assert to_text(summary_table(collection)).replace("\n", "").isprintable()


def test_latex_has_no_command_of_theirs(collection):
    lines = to_latex(summary_table(collection)).splitlines()
    comments = [line for line in lines if line.startswith("%")]
    cells = [line for line in lines if line.endswith(r"\\")]
    assert len(cells) == 1 + len(collection.rows) and all(line.isprintable() for line in comments)
    commands = set(re.findall(r"\\[a-zA-Z]+", "\n".join(cells)))
    assert commands <= {r"\textbackslash", r"\textasciicircum", r"\textasciitilde"}


def test_csv_has_no_formula(tmp_path):
    records = [fake_record("vtab/cifar", "a", 0, 0.5, backbone={"name": "=1+1", "weights": "@x"})]
    text = to_csv(collect(records, read_standard(CONFIGS)))
    assert "'=1+1" in text and "'@x" in text and not re.search(r"(^|,)[=@]", text, flags=re.MULTILINE)


def test_a_page_of_many_rows_takes_seconds():
    """Of one task: a panel for each of many would draw the same rows as often."""
    records = [
        fake_record("custom/x", "a", 0, 0.5, method={"a": {"_target_": "x.Y", "scale": float(n)}}) for n in range(500)
    ]
    (found,) = collect(records, read_standard(CONFIGS))
    assert len(found.rows) == 500
    assert within_bounds(lambda: report([found], title="t")) == "accepted"


def test_of_many_collections_the_first_are_drawn(monkeypatch, capsys):
    """500 results of backbones of their own are a collection each."""
    drawn = []
    monkeypatch.setattr(plots, "pictures_of_collection", lambda collection: drawn.append(collection) or {})
    records = [fake_record("vtab/cifar", "a", 0, 0.5, backbone={"name": f"b{n}"}) for n in range(500)]
    collections = collect(records, read_standard(CONFIGS))
    assert len(collections) == 500 and "<td>" in report(collections, title="t")
    assert len(drawn) == plots.MOST_PICTURED
    assert capsys.readouterr().err == "warning: 500 collections; the first 20 are drawn\n"


@pytest.mark.parametrize("text", ["/tmp/x", "../../x", "..", ".", "", "a/b", "\x1b[2J", "n" * 300, "con\0x"])
def test_a_sweeps_folder_lies_below_the_outputs(text):
    name = file_name(text)
    assert re.fullmatch(r"[\w+-][\w.+-]*", name) and len(name) < 200


def test_html_and_pictures_take_any_text(collection, capsys):
    page = report([collection], title=INJECTED)
    assert "<img src=x" not in page and "\x1b" not in page and "\u202e" not in page
    assert page.count("<img") == 1 and capsys.readouterr().err == ""  # the bars; no row is complete
    names = plots.pictures_of_collection(collection)
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names)


@pytest.mark.parametrize("text", [r"$\xxxxx$", "$" + "{" * 60 + "}" * 60 + "$", r"\$a$", "$", "$" + "a" * 20_000 + "$"])
def test_figures_show_dollar_signs(text):
    from matplotlib.text import Text

    shown, is_formula = Text()._preprocess_math(plots.figure_text(text))
    assert not is_formula and shown.rstrip("…") == text[: len(shown.rstrip("…"))]


def test_a_link_is_no_picture_of_a_report(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    run = tmp_path / "run"
    run.mkdir()
    written(run)
    (run / "metrics.csv").write_text("epoch,loss,accuracy\n0,1,0.5\n")
    an_npz(run, predicted=LABELS, labels=LABELS)
    (run / "predictions.png").symlink_to(secret)
    assert report([], [run], title="t").count("<img") == 2  # curves and confusion matrix
    (run / "predictions.png").unlink()
    (run / "predictions.png").write_text("no picture")
    assert report([], [run], title="t").count("<img") == 2
    secret.rename(run / "predictions.png")
    assert report([], [run], title="t").count("<img") == 3


# What cannot be drawn


@pytest.mark.parametrize("error", [MemoryError(), ValueError("Image size of 1x99999 pixels is too large"), OSError()])
def test_drawing_that_fails_is_a_warning(collection, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(plots.FigureCanvasAgg, "print_png", fail)
    page = report([collection], title="t")
    assert "<td>" in page and "<img" not in page
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith("warning: tasks-")


def test_many_classes_are_a_picture_that_can_be_read(tmp_path):
    """30,000 classes took a matrix of 7 GB; the classes with the most images are shown."""
    labels = np.concatenate([np.full(3, 29_999), np.arange(1_000), [29_999]])
    np.savez(tmp_path / "predictions.npz", predicted=np.where(labels == 29_999, 0, labels), labels=labels)
    axes = plots.confusion_matrix(tmp_path, "title", classes=30_000).axes[0]
    shares = np.asarray(axes.images[0].get_array())
    assert shares.shape == (plots.MOST_CLASSES, plots.MOST_CLASSES)
    assert "200 of 30,000 classes" in axes.get_title()
    assert shares[-1, 0] == 100 and shares[1, 1] == 100  # class 29,999 is taken for class 0
    assert axes.xaxis.get_major_formatter()(199, 0) == "29999"
