"""Tables of many runs: from result.json files to Markdown, CSV and LaTeX, ours beside the published numbers.

find → collect → build → render: which runs there are, which of them can be compared, the tables as text cells, and
their form.
"""

from mambapeft_vision.results.tables.build import (
    MISSING,
    comparison_table,
    summary_table,
    tables_of,
    task_table,
)
from mambapeft_vision.results.tables.collect import (
    AVERAGE,
    GROUPS,
    MEAN_OF_GROUPS,
    Cell,
    Collection,
    Incomplete,
    Row,
    Score,
    Standard,
    collect,
    read_standard,
)
from mambapeft_vision.results.tables.csv_lines import to_csv
from mambapeft_vision.results.tables.find import Found, find_records, find_results
from mambapeft_vision.results.tables.render import Table, to_latex, to_markdown, to_text

__all__ = [
    "AVERAGE",
    "GROUPS",
    "MEAN_OF_GROUPS",
    "MISSING",
    "Cell",
    "Collection",
    "Found",
    "Incomplete",
    "Row",
    "Score",
    "Standard",
    "Table",
    "collect",
    "comparison_table",
    "find_records",
    "find_results",
    "read_standard",
    "summary_table",
    "tables_of",
    "task_table",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_text",
]
