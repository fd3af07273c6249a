"""Drawings as SVG text: shapes, axes, and three kinds of chart. The same input gives the same bytes on every machine.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Shapes repeat what colours say, so that a
picture also works in black and white.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

INK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#d9d9d9"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
FONT = "Helvetica, Arial, sans-serif"


class Drawing:
    """A picture of `width` x `height` pixels on white, described for screen readers by `title`."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 13,
        colour: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Text whose baseline starts (or is centred, or ends) at x, y."""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, colour: str = INK, width: float = 1.2, arrow: bool = False
    ) -> None:
        head = ' marker-end="url(#head)"' if arrow else ""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width}"{head}/>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "#ffffff",
        stroke: str = INK,
        dashed: bool = False,
    ) -> None:
        dashes = ' stroke-dasharray="5 3"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="1.2"{dashes}/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def mark(self, x: float, y: float, colour: str, shape: str, r: float = 5.0) -> None:
        """A point of a chart: circle, square, diamond, triangle, down or cross; `r` is half of its size."""
        a = 0.4 * r  # half the width of the cross's arms
        corners = {
            "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
            "diamond": [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
            "triangle": [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
            "down": [(0, 1.3 * r), (1.2 * r, -r), (-1.2 * r, -r)],
            "cross": [
                (-r, -a),
                (-a, -a),
                (-a, -r),
                (a, -r),
                (a, -a),
                (r, -a),
                (r, a),
                (a, a),
                (a, r),
                (-a, r),
                (-a, a),
                (-r, a),
            ],
        }.get(shape)
        if corners is None:
            self._parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}" stroke="{INK}" stroke-width="0.7"/>'
            )
            return
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
        self._parts.append(f'<polygon points="{points}" fill="{colour}" stroke="{INK}" stroke-width="0.7"/>')

    def render(self) -> str:
        """The whole file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
                f'width="{self.width}" height="{self.height}" font-family="{FONT}">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
                f'orient="auto-start-reverse"><path d="M 0 0 L 10 5 L 0 10 z" fill="{INK}"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


@dataclass(frozen=True)
class Point:
    """A method in a scatter plot. label: written beside it; None: the mark alone."""

    x: float
    y: float
    colour: str
    shape: str
    label: str | None = None


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    legend: Sequence[tuple[str, str, str]],
    width: int = 760,
    height: int = 430,
) -> str:
    """y against log10(x), with a legend of (name, colour, shape) on the right."""
    drawing = Drawing(width, height, title)
    left, right, top, bottom = 64, width - 168, 64, height - 52
    low, high = math.floor(min(math.log10(p.x) for p in points)), math.ceil(max(math.log10(p.x) for p in points))
    floor, ceiling = _round_range([p.y for p in points])

    def at(point: Point) -> tuple[float, float]:
        across = (math.log10(point.x) - low) / (high - low)
        return left + across * (right - left), bottom - (point.y - floor) / (ceiling - floor) * (bottom - top)

    drawing.text(14, 24, title, size=15, bold=True)
    drawing.text(14, 44, y_label, size=12, colour=GREY)
    for power in range(low, high + 1):
        x = left + (power - low) / (high - low) * (right - left)
        drawing.line(x, top, x, bottom, colour=PALE)
        drawing.text(x, bottom + 18, _short(10**power), anchor="middle", colour=GREY)
    _horizontal_grid(
        drawing, floor, ceiling, left, right, lambda v: bottom - (v - floor) / (ceiling - floor) * (bottom - top)
    )
    drawing.text((left + right) / 2, height - 12, x_label, anchor="middle")
    for point in points:
        drawing.mark(*at(point), point.colour, point.shape)
    marks = [at(point) for point in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    for point, (x, y) in zip(points, marks):
        if point.label is not None:
            place = _free_place(x, y, 6.8 * len(point.label), taken, right)
            taken.append(place)
            drawing.text(place[0], place[3] - 3, point.label, size=12)
    for row, (name, colour, shape) in enumerate(legend):
        drawing.mark(right + 22, top + 10 + 22 * row, colour, shape)
        drawing.text(right + 34, top + 14 + 22 * row, name, size=12)
    return drawing.render()


SMALL = 3.4  # half the size of a mark in a bar


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart.

    value: its length. shown: the text at its end. mark: a second value, drawn as a line. shape: the shape of its kind,
    drawn in the bar for readers without colours.
    """

    label: str
    value: float
    colour: str
    shown: str
    mark: float | None = None
    shape: str | None = None


def bars(
    lines: Sequence[Bar],
    *,
    title: str,
    subtitle: str = "",
    width: int = 760,
    label_width: int = 250,
    row_height: int = 24,
    legend: Sequence[tuple[str, str, str]] = (),
) -> str:
    """Horizontal bars from zero, labelled on the left, with their values on the right.

    legend: name, colour and shape of each kind of bar, in one line below the subtitle.
    """
    top = (58 if subtitle else 40) + (24 if legend else 0)
    drawing = Drawing(width, top + row_height * len(lines) + 14, title)
    drawing.text(14, 24, title, size=15, bold=True)
    drawing.text(14, 44, subtitle, size=12, colour=GREY)
    x = 14.0
    for name, colour, shape in legend:
        drawing.bar(x, 56, 14, 14, colour)
        drawing.mark(x + 7, 63, "#ffffff", shape, r=SMALL)
        drawing.text(x + 19, 68, name, size=12)
        x += 36 + 6.4 * len(name)
    scale = (width - label_width - 120) / max(max(line.value, line.mark or 0.0) for line in lines)
    for row, line in enumerate(lines):
        y = top + row_height * row
        drawing.text(label_width - 10, y + row_height * 0.62, line.label, anchor="end")
        drawing.bar(label_width, y + 3, line.value * scale, row_height - 7, line.colour)
        if line.shape is not None:
            drawing.mark(label_width + 9, y + (row_height - 1) / 2, "#ffffff", line.shape, r=SMALL)
        if line.mark is not None:
            x = label_width + line.mark * scale
            drawing.line(x, y + 1, x, y + row_height - 2, width=2.5)
        drawing.text(label_width + max(line.value, line.mark or 0.0) * scale + 7, y + row_height * 0.62, line.shown)
    return drawing.render()


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_place(x: float, y: float, width: float, taken: Sequence[Box], right: float) -> Box:
    """Where a label beside a point covers no mark and no other label; beside it on the right where nothing is free."""
    corners = [(x + 8, y - 17), (x + 8, y + 3), (x - 8 - width, y - 17), (x - 8 - width, y + 3)]
    corners += [(x + 24, y - 27), (x + 24, y + 13), (x + 8, y - 7)]
    places = [(left, top, left + width, top + 14) for left, top in corners]
    free = [place for place in places if place[2] < right and not any(_overlap(place, other) for other in taken)]
    return free[0] if free else places[-1]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _round_range(values: Sequence[float]) -> tuple[float, float]:
    """Multiples of 5 below and above all values."""
    return 5 * math.floor(min(values) / 5), 5 * math.ceil((max(values) + 1) / 5)


def _horizontal_grid(
    drawing: Drawing, floor: float, ceiling: float, left: float, right: float, height_of: Callable[[float], float]
) -> None:
    for step in range(int((ceiling - floor) / 5) + 1):
        value = floor + 5 * step
        drawing.line(left, height_of(value), right, height_of(value), colour=PALE)
        drawing.text(left - 8, height_of(value) + 4, f"{value:g}", anchor="end", colour=GREY)


def _short(value: float) -> str:
    """1000 as 1K, 1000000 as 1M."""
    for limit, letter in ((1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"
