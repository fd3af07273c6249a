"""The explorer: complete, self-contained, and only text of what strangers named; looked at in a browser."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest
from helpers import runs
from helpers.fake_records import fake_record

from mambapeft_vision import cli
from mambapeft_vision.results.explorer import explorer, read_names
from mambapeft_vision.results.record import write_record
from mambapeft_vision.results.tables import Found, read_standard
from mambapeft_vision.run.run_config import make_plan

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += (
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1500,900 --virtual-time-budget=20000"
)
HOSTILE = '</script><img src=x onerror="document.title=1"><script>document.title=2</script>'
# Uses the page as a person would, then says what it shows.
PROBE = """
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("tbody tr")];
  const cells = at => rows().filter(row => row.cells.length > 8).map(row => row.cells[at].innerText);
  const seen = {title: document.title, first: cells(1), images: document.images.length};
  document.querySelectorAll("thead button")[5].click();
  document.querySelectorAll("thead button")[5].click();
  seen.seeds = cells(5);
  const form = document.forms[0];
  form.elements.task.value = "vtab/dtd";
  form.dispatchEvent(new Event("input"));
  seen.tasks = cells(3);
  form.elements.task.value = "";
  form.elements.method.value = "lora";
  form.dispatchEvent(new Event("input"));
  seen.methods = cells(0);
  seen.count = document.querySelector("output").innerText;
  rows()[0].dispatchEvent(new MouseEvent("mouseenter"));
  seen.command = document.querySelector("aside code").innerText;
  seen.cells = [...document.querySelectorAll("aside td")].map(cell => cell.innerText);
  form.elements.method.value = "script";
  form.dispatchEvent(new Event("input"));
  seen.hostile = cells(8);
  seen.loaded = performance.getEntriesByType("resource").length;
  seen.wide = document.documentElement.scrollWidth - innerWidth;
  document.documentElement.dataset.seen = JSON.stringify(seen);
});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("explorer")
    records = [
        fake_record("vtab/cifar", "lora_p_x", 0, 0.71, trainer={"learning_rate": 3e-3}),
        fake_record("vtab/dtd", "a", 1, 0.6),
        fake_record("vtab/dtd", "d", 2, 0.65),
        fake_record(
            "vtab/cifar", "a", 3, 0.5, device_name=HOSTILE, method={"a": {"_target_": HOSTILE, "script": HOSTILE}}
        ),
    ]
    for number, record in enumerate(records):
        (folder / str(number)).mkdir()
        write_record(folder / str(number), record)
    np.savez(folder / "0" / "predictions.npz", predicted=[0, 1, 1, 2], labels=[0, 1, 0, 2])
    cli.main(["explore", str(folder), f"--out={folder / 'page.html'}", f"--title={HOSTILE}"])
    return (folder / "page.html").read_text()


def rows_of(page: str) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL)[1])["rows"]


def test_the_page_is_self_contained_and_names_are_data(page):
    assert page.count("<script") == 2 and "onerror" in page and "<img" not in page
    assert not re.search(r'(src|href)\s*=\s*"', page.partition('id="data"')[0])
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert "innerHTML" not in script and "insertAdjacent" not in script
    assert {row["device"] for row in rows_of(page)} == {"a GPU", HOSTILE}


def test_a_row_s_command_is_the_run_s(page):
    row = next(row for row in rows_of(page) if row["method"] == "lora_p_x")
    assert row["family"] == "lora" and row["accuracy"] == 71.0
    words = shlex.split(row["command"])
    assert words[:2] == ["mambapeft", "train"]
    config = make_plan(runs.compose_train([*words[2:], "backbone.weights=random"])).config
    assert config["backbone"]["name"] == "vim_small_patch16_224" and config["dataset"]["name"] == "vtab/cifar"
    assert list(config["method"]) == ["lora_p_x"] and config["trainer"]["learning_rate"] == 3e-3


def test_confusions_of_many_classes_are_a_list(tmp_path):
    labels = np.arange(60) % 30
    predicted = np.where(labels == 7, 8, labels)
    np.savez(tmp_path / "predictions.npz", predicted=predicted, labels=labels)
    found = [Found(fake_record("vtab/cifar", "a", 0, 0.5), tmp_path)]
    text = explorer(found, read_standard(runs.CONFIGS), read_names(runs.CONFIGS), title="x")
    assert rows_of(text)[0]["confusion"] == {"pairs": [["7", "8", 2]]}


@pytest.mark.skipif(
    BROWSER is None, reason="explorer NOT SEEN in a browser: no chromium here (Debian: apt install chromium)"
)
def test_a_browser_sorts_filters_and_explains(page, tmp_path):
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    tried = page.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    file = tmp_path / "page.html"
    file.write_text(tried.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    browser = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command = [*browser, f"--screenshot={tmp_path / 'shown.png'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    seen = json.loads(unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))
    assert seen["title"] == HOSTILE and seen["images"] == 0  # nothing of it ran
    assert seen["first"] == ["71.00", "65.00", "60.00", "50.00"]  # the best first
    assert seen["seeds"] == ["0", "1", "2", "3"]
    assert seen["tasks"] == ["vtab/dtd"] * 2
    assert seen["methods"] == ["lora_p_x"] and seen["count"] == "1 of 4 results"
    assert "trainer.learning_rate=0.003" in seen["command"]
    assert [cell for cell in seen["cells"] if cell] == ["1", "1", "1", "1"]  # the counts of four images
    assert len(seen["hostile"]) == 1 and "<img" in seen["hostile"][0]
    assert seen["loaded"] == 0 and seen["wide"] <= 0
