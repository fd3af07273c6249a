"""MkDocs hooks: `<!-- generated: NAME ARGUMENT ... -->` in a page becomes what the function of that name returns.

Pages thus hold what people wrote, and code and measurements hold the rest. Nothing generated is kept in git.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from pathlib import Path

import figures
import mini_benchmark
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"<!-- generated: (.*?) -->", flags=re.DOTALL)
ROW = re.compile(r"<tr>.*?</tr>", flags=re.DOTALL)
CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")


def measured_at(*files: str) -> str:
    """Where figures come from: the files in git, the commit of each, and what it says of itself."""
    lines = []
    for name in files:
        path = name if name.startswith("results/") else f"docs/{name}"
        commit = _git("log", "-1", "--format=%h of %cs", "--", path)
        lines.append(f"* `{path}`, {f'last changed in commit {commit}' if commit else 'not in git'}{_comment(path)}")
    return "Figures come from\n\n" + "\n".join(lines)


def _comment(path: str) -> str:
    """What the first lines of a CSV file say: machine, versions, day."""
    with open(ROOT / path, encoding="utf-8") as file:
        lines = [line.strip("# \n") for line in takewhile(lambda line: line.startswith("#"), file)]
    return f": {' '.join(lines)}" if lines else ""


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def gpu_tests() -> str:
    """When the GPU tests last ran, from the file that they leave."""
    file = ROOT / "results" / "gpu-tests.json"
    if not file.is_file():
        return "No run of the GPU tests is recorded for this version."
    run = json.loads(file.read_text(encoding="utf-8"))
    counts = ", ".join(f"{run[outcome]} {outcome}" for outcome in ("passed", "failed", "error", "skipped"))
    return f"The GPU tests last ran on {run['date']} on {run['card']}, commit `{str(run['commit'])[:10]}`: {counts}."


def include(path: str, heading: str = "") -> str:
    """A file of the repository; with a heading, that section of it alone and without its title."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not heading:
        return text
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise PluginError(f"{path} has no section {heading!r}")
    return found[1].strip()


BLOCKS: dict[str, Callable[..., str]] = {
    "group-keys": reference.group_keys,
    "schema-keys": reference.schema_keys,
    "options": reference.options,
    "method-table": reference.method_table,
    "method-sections": reference.method_sections,
    "method-arguments": reference.method_arguments,
    "backbones": reference.backbone_table,
    "result-fields": reference.result_fields,
    "errors": reference.errors,
    "commands": reference.commands,
    "csv": figures.csv_table,
    "nano-backbones": figures.nano_table,
    "nano-log": figures.nano_log,
    "kernels": figures.kernel_table,
    "kernel-backends": figures.backend_table,
    "kernel-sizes": figures.size_table,
    "training": figures.training_table,
    "published-speed": figures.published_speed_table,
    "measured-at": measured_at,
    "gpu-tests": gpu_tests,
    "mini": mini_benchmark.part,
    "mini-backbones": mini_benchmark.compared,
    "mini-tables": mini_benchmark.tables,
    "include": include,
}


@cache
def block(call: str) -> str:
    """What stands for a mark. Made once in a process, also where `mkdocs serve` builds again."""
    name, *arguments = shlex.split(call)
    if name not in BLOCKS:
        raise PluginError(f"<!-- generated: {name} --> is unknown; known: {', '.join(BLOCKS)}")
    return BLOCKS[name](*arguments)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pictures of the mini benchmark."""
    for name, content in mini_benchmark.pictures().items():
        files.append(File.generated(config, f"benchmarks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    return MARK.sub(lambda mark: block(mark[1]), markdown)


def on_page_content(html: str, **_: object) -> str:
    """Marks where a browser may break a long name in a table: after a slash and before an underscore.

    The first two columns stay as they are: they hold the names that readers look for.
    """
    return ROW.sub(_mark_later_cells, html)


def _mark_later_cells(row: re.Match[str]) -> str:
    *first, later = row[0].split("</td>", 2)
    return "</td>".join([*first, CODE.sub(_breakable, later)])


def _breakable(code: re.Match[str]) -> str:
    return re.sub(r"(?<=\w)(?=_)|(?<=[/,])(?=\w)", "<wbr>", code[0])
