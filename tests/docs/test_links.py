"""Links inside the repository's Markdown lead somewhere, and the site builds without a warning."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INCLUDED = re.compile(r"<!-- generated: include (\S+)")
TOP_LEVEL = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "data/README.md",
    "results/README.md",
    "tests/golden/README.md",
)
PAGES = [
    *(ROOT / name for name in TOP_LEVEL),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "kernels").rglob("README.md")),
]

ON_GITHUB = ("methods.md", "backbones.md")  # generated files, which pages of docs/reference include


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """A page's Markdown without its code, with what it includes."""
    text = page.read_text(encoding="utf-8")
    text += "".join((ROOT / name).read_text(encoding="utf-8") for name in INCLUDED.findall(text))
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif ROOT not in target.parents:
            yield f"{link}: outside of the repository"
        elif anchor and "<!-- generated" not in target.read_text(encoding="utf-8") and anchor not in anchors_of(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("link", ["nowhere.md", "README.md#no-such-heading", "../outside.md"])
def test_a_broken_link_is_found(tmp_path: Path, link: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"[text]({ROOT / link})")
    assert list(broken_links(page))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "methods.md"], ids=name_of)
def test_lines_are_wrapped(page: Path) -> None:
    """But for tables and code; addresses of links do not count."""
    text = re.sub(r"\]\(\S+\)", "]", text_of(page))
    long = [line for line in text.splitlines() if len(line) > 120]
    assert [line for line in long if not line.startswith(("|", "    "))] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Above all the tests that hold a promise."""
    if page.name in ("history.md", "CHANGELOG.md"):  # of their day
        return
    named = re.findall(
        r"\b(?:[\w-]+/)*test_\w+\.py\b|\b(?:mambapeft_vision|scripts|configs|docs)/[\w/.-]+\.\w+", text_of(page)
    )
    assert [name for name in named if not (list(ROOT.glob(name)) or list((ROOT / "tests").rglob(name)))] == []


def test_files_that_a_readme_of_kernels_names_exist() -> None:
    kernels = ROOT / "kernels" / "mambapeft_kernels"
    named = [
        (page.parent, name)
        for page in kernels.rglob("README.md")
        for name in re.findall(r"`([\w/]+\.(?:py|cu|cuh))`", page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 20
    assert [
        name for folder, name in named if not any((place / name).exists() for place in (folder, kernels, ROOT))
    ] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        assert f": {name}\n" in navigation or name in ON_GITHUB, name


@pytest.mark.slow
@pytest.mark.exhaustive  # `make docs` does the same
@pytest.mark.usefixtures("generators")
def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict: a link or anchor that leads nowhere, or a page outside of the navigation, fails the build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b""))  # plots have tests of their own
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    html = {page: page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")}
    assert len(html) > 30
    fetched = [
        link
        for text in html.values()
        for link in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', text)
    ]
    assert fetched == [], "the site fetches nothing from elsewhere"
    assert not any("<!-- generated" in text for text in html.values())
    assert list(broken_links_of_site(html)) == []


def broken_links_of_site(html: Mapping[Path, str]) -> Iterator[str]:
    """Links between built pages, generated ones included, that lead to no file or no anchor."""
    anchors = {page: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for page, text in html.items()}
    for page, text in html.items():
        if page.name == "404.html":  # its links are those of a server's root
            continue
        for link in set(re.findall(r'<a [^>]*href="([^":]*)"', text)):
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{page}: {link}: no such file"
            elif anchor and anchor not in anchors.get(target, ()):
                yield f"{page}: {link}: no such anchor"
