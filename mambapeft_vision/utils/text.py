"""Makes untrusted text safe for the place where it is shown: terminals and logs, Markdown, LaTeX, HTML, CSV, shells.

Names from files (of methods, tasks, tensors, devices) can hold anything. Each kind of output has one function here;
code that prints such a name calls it.
"""

import html
import re
import shlex
import unicodedata
from typing import Any

LONGEST = 200  # characters of one shown value
LONGEST_NOTE = 2000  # characters of a note or a title

# Control characters, and those that change the direction or the visibility of the text around them.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
# Characters that can begin a column, code, a link or an image; names such as lora_p_x (rank=8) stay readable.
_MARKDOWN = re.compile(r"([\\`\[\]<>|])")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
}


def plain(text: object, longest: int = LONGEST) -> str:
    """One line without control characters, for terminals, logs and messages.

    Escape sequences and line ends are shown (`\\x1b`, `\\n`), not passed on. Of a text with more than `longest`
    characters the beginning is shown.
    """
    given = str(text)
    cut = given if len(given) <= longest else given[:longest] + "…"
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(_escaped(c) if unicodedata.category(c) in _HIDDEN else c for c in cut)


def lines(text: str) -> str:
    """Any text for a terminal or a log: as `plain`, but line ends and tabs stay, and nothing is cut."""
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(_escaped(c) if c not in "\n\t" and unicodedata.category(c) in _HIDDEN else c for c in text)


def shown(value: Any, longest: int = LONGEST) -> str:
    """`repr` of a value for a message: at most `longest` characters, of long lists and texts only the beginning."""
    if isinstance(value, str):
        value = value[: longest + 1]
    elif isinstance(value, (list, tuple)) and len(value) > longest:
        value = value[:longest]
    elif isinstance(value, dict) and len(value) > longest:
        value = dict(list(value.items())[:longest])
    try:
        return plain(repr(value), longest)
    except (RecursionError, ValueError):  # nested too deeply, or a whole number of thousands of digits
        return f"a {type(value).__name__}"


def markdown(text: object, longest: int = LONGEST) -> str:
    """For a cell or a line of Markdown: no column, code, link or HTML begins in it."""
    return _MARKDOWN.sub(r"\\\1", plain(text, longest)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def latex(text: object, longest: int = LONGEST) -> str:
    """For a cell or a comment of LaTeX: every character stands for itself."""
    return "".join(_LATEX.get(character, character) for character in plain(text, longest))


def html_text(text: object) -> str:
    """For HTML, in text and in quoted attributes."""
    return html.escape(plain(text), quote=True)


def csv_cell(value: object, longest: int = LONGEST) -> object:
    """For a cell of CSV: text that a spreadsheet would compute as a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    cleaned = plain(value, longest)
    return f"'{cleaned}" if cleaned[:1] in ("=", "+", "-", "@") and not _is_number(cleaned) else cleaned


def command(*words: object) -> str:
    """A command line that can be pasted into a shell: every word is quoted where it must be."""
    return shlex.join(map(str, words))


def override(key: str, value: object) -> str:
    """`key=value` of Hydra's command line, which reads the value as it is given: text as text, even `null` or `1e3`."""
    return f"{key}={_for_hydra(value)}"


def _for_hydra(value: object) -> str:
    """A value in Hydra's grammar: text in quotes where it would be read otherwise."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_for_hydra, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_for_hydra(item)}' for key, item in value.items())}}}"
    text = str(value)
    typed = _is_number(text) or text.lower() in ("null", "true", "false")
    if re.fullmatch(r"[A-Za-z0-9_./@%-]+", text) and not typed:
        return text
    # Inside of quotes a backslash stands for itself, unless a quote follows.
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), text)
    return f'"{escaped}"'


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
