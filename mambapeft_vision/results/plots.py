"""Plots of many runs, and of one: readable in print and with any kind of colour blindness."""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mambapeft_vision.results.paper import PAPER
from mambapeft_vision.results.tables import AVERAGE, GROUPS, MEAN_OF_GROUPS, Cell, Collection, Row, Score
from mambapeft_vision.utils.atomic import atomic_path
from mambapeft_vision.utils.errors import UserError

# Okabe and Ito's colours without yellow, which print loses; markers and line styles tell more apart than colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
OURS, PUBLISHED = COLOURS[0], COLOURS[1]
GROUP_COLOURS = dict(zip(GROUPS, COLOURS))
MOST_NUMBERED_CLASSES = 20


def png(figure: Figure, dpi: int = 130) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(figure))


# Many runs


def accuracy_against_parameters(collection: Collection) -> Figure | None:
    """Average accuracy of every complete row against its trained numbers, published points beside ours.

    The head counts here (the mean over tasks), as linear probing trains nothing else and the axis is logarithmic.
    None where no row is complete.
    """
    ours = [
        (collection.label(row), _trained_with_head(row), average.mean)
        for row in collection.rows
        if isinstance(average := row.average([collection.tasks]), Score)
    ]
    if not ours:
        return None
    published = [
        (row.presets[0], 1000 * row.count_k, row.average)
        for row in PAPER
        if row.backbone == collection.published_backbone and row.count_k is not None
    ]
    numbers = {name: number for number, (name, *_) in enumerate(ours, start=1)}
    figure = Figure(figsize=(9.5, max(6.5, 0.6 + 0.175 * len(ours))), layout="constrained")
    axes = figure.subplots()
    for points, colour, marker, name in ((published, PUBLISHED, "s", "published"), (ours, OURS, "o", "ours")):
        if points:
            _, x, y = zip(*points)
            filled = colour if name == "ours" else "none"
            axes.scatter(x, y, s=36, marker=marker, facecolors=filled, edgecolors=colour, linewidths=1.3, label=name)
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.06)
    axes.set_xlabel("trained numbers, head included")
    over = f"{AVERAGE} over {len(collection.tasks)} tasks" if len(collection.tasks) > 1 else collection.tasks[0]
    axes.set_ylabel(f"{over}, top-1 accuracy (%)")
    axes.set_title(collection.title)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    key = [Line2D([], [], linestyle="none", label=f"{number}  {name}") for name, number in numbers.items()]
    figure.legend(handles=key, loc="outside right upper", fontsize=8, handlelength=0, handletextpad=0, title="methods")
    if published:
        axes.legend(loc="lower left")
    named = [(str(numbers[name]), x, y, OURS) for name, x, y in ours]
    named += [(str(numbers[preset]), x, y, PUBLISHED) for preset, x, y in published if preset in numbers]
    FigureCanvasAgg(figure).draw()  # fixes the layout, on which the places of the numbers depend
    _number_points(axes, named, [(x, y) for _, x, y in (*ours, *published)])
    return figure


def task_bars(collection: Collection) -> Figure:
    """A panel a task with a bar a row; a line at its end is ± the deviation over seeds; missing bars say so."""
    columns = min(5, len(collection.tasks))
    lines = -(-len(collection.tasks) // columns)
    height = 0.9 + 0.24 * len(collection.rows)
    figure = Figure(figsize=(2.6 + 2.3 * columns, lines * height + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, task in itertools.zip_longest(panels.flat, collection.tasks):
        if task is None:
            axes.set_axis_off()
        else:
            _draw_task(axes, collection, task)
    figure.supxlabel("top-1 accuracy (%)")
    figure.suptitle(collection.title)
    return figure


def group_bars(collection: Collection) -> Figure:
    """A panel a group mean and one for the average, a bar a complete row, the best average on top."""
    rows = [(row, average.mean) for row in collection.rows if isinstance(average := _average(collection, row), Score)]
    rows = [row for row, _ in sorted(rows, key=lambda pair: -pair[1])]
    columns = {name: groups for name, groups in collection.columns().items() if name != MEAN_OF_GROUPS}
    figure = Figure(figsize=(2.6 + 2.2 * len(columns), 1.1 + 0.19 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (name, groups) in zip(panels, columns.items()):
        colour = GROUP_COLOURS.get(name, "0.35")
        for place, row in enumerate(rows):
            cell = row.average(groups)
            axes.barh(place, cell.mean, xerr=cell.std, color=colour, height=0.78, error_kw={"linewidth": 0.8})
            x, text_colour = (1.5, "white") if cell.mean > 18 else (cell.mean + 3, "black")
            axes.text(x, place, f"{cell.mean:.1f}", va="center", fontsize=6, color=text_colour, fontweight="bold")
        axes.set_title(name.lower() if name in GROUPS else f"all {len(collection.tasks)} tasks", fontsize=9)
        axes.set_yticks(range(len(rows)), [collection.label(row) for row in rows], fontsize=7)
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
    ordered = sorted(labelled, key=lambda item: -item[1])
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
    axes.set_yticks(range(len(ordered)), [label for label, *_ in ordered], fontsize=7)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"average accuracy minus that of {against},\npercent points with 95 % intervals", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _average(collection: Collection, row: Row) -> Cell:
    return row.average([collection.tasks])


def figures_of(collections: Sequence[Collection]) -> dict[str, Figure]:
    """Every plot of many runs that can be drawn, by name: `accuracy-vtab-vim_small_patch16_224`, `tasks-…`.

    Collections of the same tasks and backbone (other splits or weights) get numbers.
    """
    figures: dict[str, Figure] = {}
    for collection in collections:
        for kind, figure in (("accuracy", accuracy_against_parameters(collection)), ("tasks", task_bars(collection))):
            if figure is not None:
                name = f"{kind}-{collection.family}-{collection.backbone}"
                number = sum(other.partition(".")[0] == name for other in figures)
                figures[f"{name}.{number + 1}" if number else name] = figure
    return figures


def _draw_task(axes: Axes, collection: Collection, task: str) -> None:
    group = next((group for group, tasks in collection.groups.items() if task in tasks), None)
    for place, row in enumerate(collection.rows):
        cell = row.score(task)
        if isinstance(cell, Score):
            colour = GROUP_COLOURS.get(group, COLOURS[0])
            axes.barh(place, cell.mean, xerr=cell.std, color=colour, height=0.75, error_kw={"linewidth": 1})
            inside = cell.mean > 20
            x, text_colour = (2, "white") if inside else (cell.mean + 4, "black")
            axes.text(x, place, f"{cell.mean:.1f}", va="center", fontsize=7, color=text_colour, fontweight="bold")
        else:
            axes.text(2, place, "missing", va="center", fontsize=7, color="0.4", style="italic")
    axes.set_title(task.partition("/")[2] + (f" ({group.lower()})" if group else ""), fontsize=9)
    axes.set_yticks(range(len(collection.rows)), [collection.label(row) for row in collection.rows], fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(collection.rows) - 0.5, -0.5)
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
    taken = [axes.transData.transform(point) for point in points]
    radius = axes.figure.dpi / 72 * 9  # of a text or point and some air, in pixels
    for text, x, y, colour in named:
        own = axes.transData.transform((x, y))
        turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        places = [own + far * radius * np.array((np.cos(t), np.sin(t))) for far in (1, 1.6, 2.4, 3.2) for t in turns]
        # How far a place is from all else; points may be a little nearer than texts, which the radius allows for.
        room = [min(np.hypot(*(np.array(taken) - place).T)) for place in places]
        best = next((i for i, free in enumerate(room) if free >= 0.95 * radius), int(np.argmax(room)))
        taken.append(places[best])
        far = np.hypot(*(places[best] - own)) > 1.3 * radius
        axes.annotate(
            text,
            (x, y),
            xytext=axes.transData.inverted().transform(places[best]),
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5} if far else None,
        )


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
        metrics = _read_metrics(folder / "metrics.csv")
        epochs = [int(row["epoch"]) + 1 for row in metrics]
        longest = max(longest, *epochs)
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
            "markevery": max(1, len(epochs) // 8),
            "markersize": 5,
        }
        loss.plot(epochs, [float(row["loss"]) for row in metrics], label=name, **style)
        accuracy.plot(epochs, [100 * float(row["accuracy"]) for row in metrics], label=name, **style)
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

    Args:
        run: folder with predictions.npz.
        classes: number of classes; default: the largest label or prediction and one.
    """
    with np.load(run / "predictions.npz") as file:
        predicted, labels = file["predicted"], file["labels"]
    count = classes or int(max(predicted.max(), labels.max())) + 1
    counts = np.zeros((count, count), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(9.0, 3.5 + 0.3 * count)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=20, steps=[1, 2, 5, 10]))
    if count <= MOST_NUMBERED_CLASSES:
        _write_shares(axes, shares)
    return figure


def _write_shares(axes: Axes, shares: np.ndarray) -> None:
    for (true, predicted), share in np.ndenumerate(shares):
        if share >= 0.5:
            colour = "black" if share > 55 else "white"
            axes.text(predicted, true, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _read_metrics(file: Path) -> list[dict[str, str]]:
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); expected the folder of a run") from error
