"""Plots show the numbers they are given. That they are readable was judged by eye, not here."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.fake_records import CONFIGS, fake_record
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from PIL import Image

from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.results import plots
from mambapeft_vision.results.tables import collect, read_standard
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.startup import drop_unusable_backend

ALL = [task.name for task in TASKS.values()]


@pytest.fixture(scope="module")
def collection():
    complete = [fake_record(task, "lora_p_x", seed, 0.7 + seed / 100) for task in ALL for seed in (0, 1)]
    partial = [fake_record(task, "a", 0, 0.6) for task in ALL[1:]]
    (found,) = collect([*complete, *partial], read_standard(CONFIGS))
    return found


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_only_complete_rows_are_points(collection):
    axes = plots.accuracy_against_parameters(collection).axes[0]
    published, ours = axes.collections
    heads = sum(385 * task.num_classes for task in TASKS.values()) / 19
    np.testing.assert_allclose(ours.get_offsets(), [[1_769_472 + heads, 70.5]])
    assert [1_778_000, 71.52] in np.asarray(published.get_offsets()).tolist()
    assert axes.get_xscale() == "log"
    assert texts(axes) == ["1", "1"]  # ours and the published point of the same method


def test_no_complete_row_no_plot(collection):
    partial = [fake_record(task, "a", 0, 0.6) for task in ALL[1:]]
    (alone,) = collect(partial, read_standard(CONFIGS))
    assert plots.accuracy_against_parameters(alone) is None


def test_bars_have_a_panel_a_task_and_say_what_is_missing(collection):
    panels = [axes for axes in plots.task_bars(collection).axes if axes.get_title()]
    assert [axes.get_title().partition(" ")[0] for axes in panels] == [task.partition("/")[2] for task in ALL]
    assert texts(panels[0]) == ["missing", "70.5"] and texts(panels[1]) == ["60.0", "70.5"]
    assert [round(bar.get_width(), 6) for bar in panels[1].patches] == [60.0, 70.5]


def test_curves_follow_metrics(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss,accuracy\n0,2.0,0.25\n1,1.0,0.5\n")
    loss, accuracy = plots.training_curves({"run": tmp_path}).axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, 2], [2, 1]])
    np.testing.assert_array_equal(accuracy.lines[0].get_xydata(), [[1, 25], [2, 50]])
    (tmp_path / "metrics.csv").write_text("epoch,loss,accuracy\n0,2.0,0.25\n")
    assert all(tick == int(tick) for tick in plots.training_curves({"run": tmp_path}).axes[0].get_xticks())
    with pytest.raises(UserError, match=r"metrics\.csv cannot be read"):
        plots.training_curves({"run": tmp_path / "nowhere"})


def test_confusion_matrix_has_shares_of_true_classes(tmp_path):
    np.savez(tmp_path / "predictions.npz", predicted=np.array([0, 1, 1, 1]), labels=np.array([0, 0, 0, 1]))
    axes = plots.confusion_matrix(tmp_path, "title", classes=3).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[100 / 3, 200 / 3, 0], [0, 100, 0], [0, 0, 0]])
    assert texts(axes) == ["33", "67", "100"]


def test_files_are_images(tmp_path, collection):
    plots.save(plots.task_bars(collection), tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        image.load()
        assert image.width > 1000
    assert Image.open(io.BytesIO(plots.png(plots.task_bars(collection)))).format == "PNG"


def test_a_figure_is_drawn_once():
    """Matplotlib's print_figure draws twice."""
    drawings = []

    class Drawn(Artist):
        def draw(self, renderer):
            drawings.append(renderer)

    figure = Figure(figsize=(1, 1), layout="constrained")
    figure.add_artist(Drawn())
    assert Image.open(io.BytesIO(plots.png(figure, dpi=50))).size == (50, 50)
    assert len(drawings) == 1


INLINE = "module://matplotlib_inline_of_a_notebook.backend_inline"


@pytest.mark.parametrize(
    ("backend", "left"), [(INLINE, None), ("module://", None), ("module://json", "module://json"), ("svg", "svg")]
)
def test_a_backend_that_is_not_here_is_forgotten(backend, left, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", backend)
    drop_unusable_backend()
    assert os.environ.get("MPLBACKEND") == left


def test_a_backend_that_a_notebook_chose_is_no_matter():
    program = (
        "import io, os, mambapeft_vision\n"
        "assert 'MPLBACKEND' not in os.environ\n"  # old releases of Matplotlib fail when they are imported
        "from matplotlib.figure import Figure\n"
        "Figure(figsize=(1, 1)).savefig(file := io.BytesIO())\n"
        "assert file.getvalue()[:4] == b'\\x89PNG'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "MPLBACKEND": INLINE})
