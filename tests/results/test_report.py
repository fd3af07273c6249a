"""The report is one well-formed file that holds every number of the tables and readable images."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_records import CONFIGS, fake_record
from PIL import Image

from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.results.record import write_record
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import collect, read_standard, tables_of

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that tags are balanced; collects cells, images and everything that would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.images: list[bytes] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "img":
            assert values["alt"]
            kind, _, content = values["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(base64.b64decode(content, validate=True))
        elif "src" in values or "href" in values:
            self.outside.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_record(folder, fake_record("vtab/svhn", "a", 0, 0.5, dataset={"num_classes": 10}))
    np.savez(folder / "predictions.npz", predicted=np.arange(10), labels=np.arange(10))
    (folder / "metrics.csv").write_text("epoch,loss,accuracy\n0,2.0,0.25\n1,1.0,0.5\n")
    Image.new("RGB", (64, 48)).save(folder / "predictions.png")
    return folder


def test_the_report_holds_tables_plots_and_examples(run):
    records = [
        fake_record(task.name, preset, s, 0.6) for task in TASKS.values() for preset in ("a", "d") for s in (0, 1)
    ]
    (collection,) = collect(records[1:], read_standard(CONFIGS))
    text = report([collection], [run], title="A <title>")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and reader.outside == [] and "A &lt;title&gt;" in text
    expected = [cell for table in tables_of(collection) for row in (table.header, *table.rows) for cell in row]
    assert reader.cells == expected
    assert len(reader.images) == 2 + 3  # scatter and bars; curves, confusion matrix and page of the run
    for content in reader.images:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
