"""The report as a browser shows it. Needs Chromium; skips itself where there is none."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_records import CONFIGS, fake_record
from PIL import Image

from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.results.pictures import draw_from_files, page_of_predictions, run_title
from mambapeft_vision.results.record import read_record, write_record
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import collect, read_standard, tables_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Off: what would call home or need a sandbox's rights.
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --hide-scrollbars --window-size=1300,900"
# Asks the page what is really shown, when everything has loaded.
PROBE = """<script>
addEventListener("load", () => {
  const shown = element => element.getClientRects().length > 0 && element.offsetHeight > 0;
  document.documentElement.dataset.seen = JSON.stringify({
    images: [...document.images].map(image => [image.alt, image.naturalWidth, image.width]),
    headings: [...document.querySelectorAll("h1, h2")].filter(shown).map(heading => heading.innerText),
    cells: [...document.querySelectorAll("th, td")].filter(shown).map(cell => cell.innerText),
    tooWide: document.documentElement.scrollWidth - innerWidth,
    loaded: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
  });
});
</script>"""


def example_run(folder: Path) -> Path:
    folder.mkdir()
    write_record(folder, fake_record("vtab/svhn", "a", 0, 0.5, dataset={"num_classes": 10}))
    random = np.random.RandomState(0)
    labels = random.randint(0, 10, 300)
    predicted = np.where(random.rand(300) < 0.7, labels, random.randint(0, 10, 300))
    np.savez(folder / "predictions.npz", predicted=predicted, labels=labels)
    rows = "".join(f"{epoch},{2 / (epoch + 1)},{epoch / 10}\n" for epoch in range(10))
    (folder / "metrics.csv").write_text(f"epoch,loss,accuracy\n{rows}")
    title = run_title(read_record(folder))
    draw_from_files(folder, title=title, num_classes=10)
    images = random.randint(0, 255, (32, 3, 16, 16), dtype=np.uint8)
    page_of_predictions(images, predicted, labels, folder / "predictions.png", title=title)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="report NOT SEEN in a browser: no chromium here (Debian: apt install chromium)"
)
def test_a_browser_shows_every_table_and_picture(tmp_path):
    records = [
        fake_record(task.name, preset, seed, 0.6 + seed / 50)
        for task in TASKS.values()
        for preset in ("a", "d")
        for seed in (0, 1)
    ]
    (collection,) = collect(records[1:], read_standard(CONFIGS))
    text = report([collection], [example_run(tmp_path / "run")], title="Vim & <others>")
    page = tmp_path / "report.html"
    page.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    browser = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    shown = tmp_path / "shown.png"
    command = [*browser, f"--screenshot={shown}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    seen = json.loads(unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))

    tables = tables_of(collection)
    assert seen["headings"] == ["Vim & <others>", *(table.title for table in tables), "Single runs"]
    assert seen["cells"] == [cell for table in tables for row in (table.header, *table.rows) for cell in row]
    assert len(seen["images"]) == 5 and len({alt for alt, *_ in seen["images"]}) == 5
    for alt, natural, width in seen["images"]:
        assert natural > 400 and 300 < width <= 1300, alt  # decoded, and as wide as the page at most
    assert seen["tooWide"] <= 0 and seen["loaded"] == 0
    with Image.open(shown) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # no blank page
