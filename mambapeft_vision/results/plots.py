"""Plots of many runs, and of one: readable in print and with any kind of colour blindness."""

import io
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mambapeft_vision.results.layout import file_name
from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.results.predictions import read_class_names, read_labels
from mambapeft_vision.results.tables import AVERAGE, GROUPS, MEAN_OF_GROUPS, Cell, Collection, Row, Score
from mambapeft_vision.utils.atomic import atomic_path
from mambapeft_vision.utils.text import plain

# Okabe and Ito's colours without yellow, which print loses; markers and line styles tell more apart than colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
OURS, PUBLISHED = COLOURS[0], COLOURS[1]
GROUP_COLOURS = dict(zip(GROUPS, COLOURS))
# Limits of what a reader can distinguish and image formats can hold.
MOST_PICTURED = 20  # collections: each picture takes half a second
MOST_ROWS = 100
MOST_TASKS = 60
MOST_CLASSES = 200
MOST_NUMBERED_CLASSES = 20
MOST_NAMED_CLASSES = 40


def without_latex() -> None:
    """Undoes what Matplotlib took from a file in the current folder, which may be anybody's: LaTeX would run it."""
    if not Path(mpl.matplotlib_fname()).is_absolute():
        mpl.rcParams["text.usetex"] = False


without_latex()  # when this is imported: each text that is drawn asks for it


def png(figure: Figure, dpi: int = 130) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).print_png(buffer)  # print_figure draws twice
    return buffer.getvalue()


def save(figure: Figure, path: str | Path, dpi: int = 130) -> None:
    """Writes a PNG atomically."""
    save_png(png(figure, dpi), path)


def save_png(content: bytes, path: str | Path) -> None:
    """Writes the bytes of a PNG file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def drawn(what: str, draw: Callable[[], Figure | None]) -> bytes | None:
    """A figure as PNG. None if there is nothing to draw, or if drawing fails, which a line on stderr reports.

    Commands draw through this function, so that a picture never fails a result or a table.
    """
    try:
        figure = draw()
        return None if figure is None else png(figure)
    except Exception as error:
        print(f"warning: {plain(what)} is not drawn ({type(error).__name__}: {plain(error)})", file=sys.stderr)
        return None


def figure_text(text: object, longest: int = 120) -> str:
    """Text for a figure, shortened, with dollar signs that start no formula."""
    return plain(text, longest).replace("$", r"\$")


# Many runs


def accuracy_against_parameters(collection: Collection) -> Figure | None:
    """Average accuracy of every complete row against its trained parameters, published points beside ours.

    The head counts here (the mean over tasks), as linear probing trains nothing else and the axis is logarithmic.
    None where no row is complete.
    """
    ours = [
        (_label(collection, row), _trained_with_head(row), average.mean)
        for row in collection.rows
        if isinstance(average := row.average([collection.tasks]), Score)
    ]
    if not ours:
        return None
    published = [
        (row.presets[0], 1000.0 * row.count_k, row.average)
        for row in collection.published_rows
        if row.count_k is not None
    ]
    best = sorted(ours, key=lambda point: -point[2])[:MOST_ROWS]
    named_rows = [point for point in ours if len(ours) <= MOST_ROWS or point in best]
    numbers = {name: number for number, (name, *_) in enumerate(named_rows, start=1)}
    figure = Figure(figsize=(9.5, max(6.5, 0.6 + 0.175 * len(named_rows))), layout="constrained")
    axes = figure.subplots()
    for points, colour, marker, name in ((published, PUBLISHED, "s", "published"), (ours, OURS, "o", "ours")):
        if points:
            _, x, y = zip(*points, strict=True)
            filled = colour if name == "ours" else "none"
            axes.scatter(x, y, s=36, marker=marker, facecolors=filled, edgecolors=colour, linewidths=1.3, label=name)
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.06)
    axes.set_xlabel("trained parameters, head included")
    over = f"{AVERAGE} over {len(collection.tasks)} tasks" if len(collection.tasks) > 1 else collection.tasks[0]
    axes.set_ylabel(figure_text(f"{over}, top-1 accuracy (%)"))
    axes.set_title(figure_text(collection.title))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    key = [Line2D([], [], linestyle="none", label=f"{number}  {name}") for name, number in numbers.items()]
    figure.legend(
        handles=key,
        loc="outside right upper",
        fontsize=8,
        handlelength=0,
        handletextpad=0,
        title=_title_of_key(len(ours)),
    )
    if published:
        axes.legend(loc="lower left")
    named = [(str(numbers[name]), x, y, OURS) for name, x, y in named_rows]
    named += [(str(numbers[preset]), x, y, PUBLISHED) for preset, x, y in published if preset in numbers]
    figure.draw_without_rendering()  # fixes the layout, on which the places of the numbers depend
    _number_points(axes, named, [(x, y) for _, x, y in (*ours, *published)])
    return figure


def task_bars(collection: Collection) -> Figure:
    """A panel a task with a bar a row; a line at its end is ± the deviation over seeds; missing bars say so."""
    rows, tasks = _shown_rows(collection), collection.tasks[:MOST_TASKS]
    columns = min(5, len(tasks))
    lines = -(-len(tasks) // columns)
    height = 0.9 + 0.24 * len(rows)
    figure = Figure(figsize=(2.6 + 2.3 * columns, min(300.0, lines * height + 0.5)), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, task in itertools.zip_longest(panels.flat, tasks):
        if task is None:
            axes.set_axis_off()
        else:
            _draw_task(axes, collection, rows, task)
    # Of all panels, which share their axes: for each panel by itself, long tables would take a third longer.
    panels[0, 0].set_yticks(range(len(rows)), [_label(collection, row) for row in rows])
    panels[0, 0].set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
    figure.supxlabel("top-1 accuracy (%)")
    figure.suptitle(figure_text(collection.title) + _left_out(collection, rows, tasks))
    return figure


def group_bars(collection: Collection) -> Figure:
    """A panel a group mean and one for the average, a bar a complete row, the best average on top."""
    rows = [row for row, cell in _best_first(collection) if isinstance(cell, Score)][:MOST_ROWS]
    columns = {name: groups for name, groups in collection.columns().items() if name != MEAN_OF_GROUPS}
    figure = Figure(figsize=(2.6 + 2.2 * len(columns), 1.1 + 0.19 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (name, groups) in zip(panels, columns.items()):
        colour = GROUP_COLOURS.get(name, "0.35")
        for place, row in enumerate(rows):
            cell = row.average(groups)
            assert isinstance(cell, Score)  # as the average over all tasks is
            axes.barh(place, cell.mean, xerr=cell.std, color=colour, height=0.78, error_kw={"linewidth": 0.8})
            x, text_colour = (1.5, "white") if cell.mean > 18 else (cell.mean + 3, "black")
            axes.text(x, place, f"{cell.mean:.1f}", va="center", fontsize=6, color=text_colour, fontweight="bold")
        axes.set_title(name.lower() if name in GROUPS else f"all {len(collection.tasks)} tasks", fontsize=9)
        axes.set_yticks(range(len(rows)), [_label(collection, row) for row in rows], fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlim(0, 100)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("mean top-1 accuracy (%)", fontsize=9)
    return figure


def differences(labelled: Sequence[tuple[str, float, float | None, bool]], against: str) -> Figure:
    """A point a method with its interval, the largest on top: filled where zero is outside by Holm's rule.

    Args:
        labelled: label, mean difference, half of its interval (None: unknown), whether it holds.
        against: label of what is subtracted.
    """
    ordered = sorted(labelled, key=lambda item: -item[1])[:MOST_ROWS]
    figure = Figure(figsize=(6.5, 1.1 + 0.19 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.4", linewidth=1)
    for place, (_, mean, half, holds) in enumerate(ordered):
        colour = "0.45" if not holds else COLOURS[0] if mean > 0 else COLOURS[1]
        axes.errorbar(
            mean,
            place,
            xerr=half,
            fmt="o" if mean > 0 else "s",
            color=colour,
            markerfacecolor=colour if holds else "white",
            markersize=4.5,
            linewidth=1.2,
            capsize=2,
        )
    axes.set_yticks(range(len(ordered)), [figure_text(label) for label, *_ in ordered], fontsize=7)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(
        f"average accuracy minus that of {figure_text(against)},\npercent points with 95 % intervals", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def named_apart(pictures: Iterable[Mapping[str, bytes]]) -> dict[str, bytes]:
    """The pictures of several collections in one mapping; equal names (other splits or weights) get numbers."""
    found: dict[str, bytes] = {}
    seen: Counter[str] = Counter()
    for name, content in (item for of_one in pictures for item in of_one.items()):
        seen[name] += 1
        found[f"{name}.{seen[name]}" if seen[name] > 1 else name] = content
    return found


def pictures_of_collection(collection: Collection) -> dict[str, bytes]:
    """The plots of one collection as PNG, by the name of their file without ending.

    `accuracy-vtab-vim_small_patch16_224` where a row is complete, and `tasks-…`.
    """
    place = f"{file_name(collection.family)}-{file_name(collection.backbone)}"
    draw: dict[str, Callable[[], Figure | None]] = {
        f"accuracy-{place}": lambda: accuracy_against_parameters(collection),
        f"tasks-{place}": lambda: task_bars(collection),
    }
    found = {name: drawn(name, function) for name, function in draw.items()}
    return {name: content for name, content in found.items() if content is not None}


def pictures_of_collections(collections: Sequence[Collection]) -> list[dict[str, bytes]]:
    """`pictures_of_collection` of each. If there are many, only the first are drawn, and a line on stderr says so."""
    if len(collections) > MOST_PICTURED:
        print(f"warning: {len(collections):,} collections; the first {MOST_PICTURED} are drawn", file=sys.stderr)
    drawn_ones = [pictures_of_collection(collection) for collection in collections[:MOST_PICTURED]]
    return [*drawn_ones, *({} for _ in collections[MOST_PICTURED:])]


def _best_first(collection: Collection) -> list[tuple[Row, Cell]]:
    """Complete rows, the best average first, then the others as they are."""
    rows = [(row, row.average([collection.tasks])) for row in collection.rows]
    return sorted(rows, key=lambda pair: -pair[1].mean if isinstance(pair[1], Score) else 1.0)


def _shown_rows(collection: Collection) -> Sequence[Row]:
    """All rows in their order, or the best where they are too many."""
    if len(collection.rows) <= MOST_ROWS:
        return collection.rows
    return [row for row, _ in _best_first(collection)[:MOST_ROWS]]


def _left_out(collection: Collection, rows: Sequence[Row], tasks: Sequence[str]) -> str:
    parts = []
    if len(rows) < len(collection.rows):
        parts.append(f"the best {len(rows)} of {len(collection.rows):,} rows")
    if len(tasks) < len(collection.tasks):
        parts.append(f"{len(tasks)} of {len(collection.tasks):,} tasks")
    return f"\n({', '.join(parts)})" if parts else ""


def _title_of_key(rows: int) -> str:
    return "methods" if rows <= MOST_ROWS else f"the best {MOST_ROWS} of {rows:,} methods"


def _label(collection: Collection, row: Row) -> str:
    return figure_text(collection.label(row), 80)


def _draw_task(axes: Axes, collection: Collection, rows: Sequence[Row], task: str) -> None:
    group = next((group for group, tasks in collection.groups.items() if task in tasks), None)
    for place, row in enumerate(rows):
        cell = row.score(task)
        if isinstance(cell, Score):
            colour = GROUP_COLOURS.get(group or "", COLOURS[0])
            axes.barh(place, cell.mean, xerr=cell.std, color=colour, height=0.75, error_kw={"linewidth": 1})
            inside = cell.mean > 20
            x, text_colour = (2, "white") if inside else (cell.mean + 4, "black")
            axes.text(x, place, f"{cell.mean:.1f}", va="center", fontsize=7, color=text_colour, fontweight="bold")
        else:
            axes.text(2, place, "missing", va="center", fontsize=7, color="0.4", style="italic")
    name = task.partition("/")[2] or task
    axes.set_title(figure_text(name, 40) + (f" ({group.lower()})" if group else ""), fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _trained_with_head(row: Row) -> float:
    records = row.records.values()
    return row.any_record.trainable + sum(record.head for record in records) / len(records)


def _number_points(
    axes: Axes, named: Sequence[tuple[str, float, float, str]], points: Sequence[Sequence[float]]
) -> None:
    """Writes a text in its colour beside each point, where it covers neither a point nor another text if there is room.

    named: text, x, y and colour; points: x and y of everything drawn.
    """
    taken = _Neighbours(axes.figure.dpi / 72 * 9)  # radius of a text or point and some air, in pixels
    for point in points:
        taken.add(axes.transData.transform(point))
    turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for text, x, y, colour in named:
        own = axes.transData.transform((x, y))
        places = [
            own + far * taken.radius * np.array((np.cos(t), np.sin(t))) for far in (1, 1.6, 2.4, 3.2) for t in turns
        ]
        # How far a place is from all else; points may be a little nearer than texts, which the radius allows for.
        room = [taken.distance(place) for place in places]
        best = next((i for i, free in enumerate(room) if free >= 0.95 * taken.radius), int(np.argmax(room)))
        taken.add(places[best])
        far = np.hypot(*(places[best] - own)) > 1.3 * taken.radius
        left, low = axes.transData.inverted().transform(places[best])
        axes.annotate(
            text,
            (x, y),
            xytext=(left, low),
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5} if far else None,
        )


class _Neighbours:
    """Places in squares as wide as a radius, so that one's surroundings are found without looking at all of them."""

    def __init__(self, radius: float) -> None:
        self.radius = radius
        self._squares: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)

    def add(self, place: np.ndarray) -> None:
        self._squares[self._square(place)].append(place)

    def distance(self, place: np.ndarray) -> float:
        """The distance to the nearest place, or the radius if none is nearer."""
        left, low = self._square(place)
        near = [p for i in (-1, 0, 1) for j in (-1, 0, 1) for p in self._squares.get((left + i, low + j), ())]
        return min((float(np.hypot(*(p - place))) for p in near), default=self.radius)

    def _square(self, place: np.ndarray) -> tuple[int, int]:
        return int(place[0] // self.radius), int(place[1] // self.radius)


# One run, or a few


def training_curves(runs: Mapping[str, Path]) -> Figure:
    """Loss and accuracy by epoch, as trained (dropout and drop path on).

    Args:
        runs: folders with metrics.csv, by the name that the legend has.
    Raises: UserError for a folder without metrics.csv.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    longest = 0
    for number, (name, folder) in enumerate(runs.items()):
        metrics = [row for row in read_metrics(folder) if {"loss", "accuracy"} <= row.keys()]
        epochs = [int(row["epoch"]) + 1 for row in metrics]
        longest = max(longest, *epochs, 0)
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
            "markevery": max(1, len(epochs) // 8),
            "markersize": 5,
        }
        loss.plot(epochs, [row["loss"] for row in metrics], label=figure_text(name), **style)
        accuracy.plot(epochs, [100 * row["accuracy"] for row in metrics], label=figure_text(name), **style)
    for axes, text in ((loss, "training loss"), (accuracy, "training accuracy (%)")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(text)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if longest == 1:  # a single point has no width to place whole numbers in
            axes.set_xlim(0, 2)
        axes.grid(alpha=0.3)
    loss.legend(fontsize=8)
    return figure


def confusion_matrix(run: Path, title: str, classes: int | None = None) -> Figure:
    """Shares of each true class (rows) by predicted class; with numbers where the classes are few.

    With more classes than can be read, those with the most test images are shown.

    Args:
        run: folder with predictions.npz.
        classes: number of classes; default: the largest label or prediction and one.
    """
    predicted, labels = read_labels(run)
    class_names = read_class_names(run)
    count = max(classes or 0, int(max(predicted.max(), labels.max())) + 1)
    if count > MOST_CLASSES:
        names, images = np.unique(labels, return_counts=True)
        shown = np.sort(names[np.argsort(-images, kind="stable")][:MOST_CLASSES])
        title = f"{title}\n({len(shown)} of {count:,} classes)"
        inside = np.isin(labels, shown) & np.isin(predicted, shown)
        sizes = np.maximum(np.bincount(np.searchsorted(shown, labels[np.isin(labels, shown)]), minlength=len(shown)), 1)
        predicted, labels = np.searchsorted(shown, predicted[inside]), np.searchsorted(shown, labels[inside])
    else:
        shown = np.arange(count)
        sizes = np.maximum(np.bincount(labels, minlength=count), 1)
    counts = np.zeros((len(shown), len(shown)), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    shares = 100 * counts / sizes[:, None]
    side = min(9.0, 3.5 + 0.3 * len(shown))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("\n".join(map(figure_text, title.split("\n"))))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=20, steps=[1, 2, 5, 10]))
        if count > MOST_CLASSES:
            axis.set_major_formatter(lambda place, _: str(shown[int(place)]) if 0 <= place < len(shown) else "")
    if class_names is not None and len(class_names) == count and len(shown) <= MOST_NAMED_CLASSES:
        words = [figure_text(name if len(name) <= 20 else f"{name[:19]}…") for name in (class_names[k] for k in shown)]
        axes.set_xticks(range(len(shown)), words, rotation=60, ha="right")
        axes.set_yticks(range(len(shown)), words)
    if len(shown) <= MOST_NUMBERED_CLASSES:
        _write_shares(axes, shares)
    return figure


def _write_shares(axes: Axes, shares: np.ndarray) -> None:
    for (true, predicted), share in np.ndenumerate(shares):
        if share >= 0.5:
            colour = "black" if share > 55 else "white"
            axes.text(predicted, true, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
