"""Docstrings for mkdocstrings: one-line `Returns:` and `Raises:` become paragraphs, examples become code."""

import re
from textwrap import dedent
from typing import Any

import griffe

ONE_LINE = re.compile(r"^(Returns|Raises): (.+(?:\n {4}.*)*)$", flags=re.MULTILINE)
TITLED = re.compile(r"^Example: (.+)\n((?: {4}.*\n?)+)", flags=re.MULTILINE)


class Sections(griffe.Extension):
    """Rewrites docstrings as they are collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = ONE_LINE.sub(r"\n**\1:** \2\n", obj.docstring.value)
        text = TITLED.sub(lambda found: f"**Example:** {found[1]}\n\n```python\n{dedent(found[2])}\n```\n", text)
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
