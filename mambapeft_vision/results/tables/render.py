"""A table of text as Markdown, LaTeX or aligned columns. Every cell, title and note may hold any text."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mambapeft_vision.utils.text import LONGEST_NOTE, latex, markdown, plain


@dataclass(frozen=True)
class Table:
    """Text cells.

    Args:
        title: "" for none.
        header: names of the columns.
        rows: as many cells each as the header has.
        notes: sentences below the table.
        left: columns that are aligned to the left; the others are numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    left: Collection[int] = field(default=(0,))

    @property
    def lines(self) -> list[Sequence[str]]:
        """The header and the rows."""
        return [self.header, *self.rows]


def to_markdown(table: Table) -> str:
    """The table with its title as a heading and its notes below."""
    lines = [[markdown(cell) for cell in line] for line in table.lines]
    header, *rows = _aligned(lines, table.left)
    widths = [len(cell) for cell in header]
    rule = ["-" * width if i in table.left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    title = [f"### {markdown(table.title, LONGEST_NOTE)}", ""] if table.title else []
    body = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
    notes = [f"{markdown(note, LONGEST_NOTE)}  " for note in table.notes]
    return "\n".join([*title, *body, "", *notes, ""])


def to_latex(table: Table) -> str:
    """A tabular, which needs no packages, with title and notes as comments."""
    comments = [f"% {plain(text, LONGEST_NOTE)}" for text in (table.title, *table.notes) if text]
    header, *rows = [" & ".join(map(_latex_cell, line)) + r" \\" for line in table.lines]
    columns = "".join("l" if i in table.left else "r" for i in range(len(table.header)))
    begin = rf"\begin{{tabular}}{{{columns}}}"
    return "\n".join([*comments, begin, r"\hline", header, r"\hline", *rows, r"\hline", r"\end{tabular}", ""])


def to_text(table: Table) -> str:
    """Aligned columns for a terminal, a rule below the header; without title and notes."""
    header, *rows = _aligned([[plain(cell) for cell in line] for line in table.lines], table.left)
    rule = ["─" * len(cell) for cell in header]
    return "\n".join("  ".join(cells).rstrip() for cells in (header, rule, *rows))


def _aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        for line in lines
    ]


def _latex_cell(text: str) -> str:
    return latex(text).replace("±", r"$\pm$").replace("†", r"$\dagger$").replace("–", "--")
