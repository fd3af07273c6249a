"""The documentation's code is run: every fenced block below `<!-- snippet: run -->`, page by page, from top to bottom.

A page's blocks share a folder that is empty but for `data`, as if the package were installed and nothing else there.
`<!-- snippet: file PATH -->` writes the next block to that path; blocks marked `run slowly` are exhaustive tests.
Runs train on and are tested with the first images of each split alone: the pages' commands are tested, not accuracies.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from docs.snippets import Place, Snippet, pages, snippets_of

from mambapeft_vision import backbones, methods
from mambapeft_vision.backbones.registry import registered
from mambapeft_vision.data import module
from mambapeft_vision.data.image_list import ImageList
from mambapeft_vision.data.module import TaskDataModule

FEW = 48  # images of a split: two steps, the second of half a batch
WITH_SNIPPETS = [page for page in pages() if snippets_of(page)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all pages keep their tasks, so that the demo's is laid out once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def place(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An empty folder but for `data`, with few images in each task."""
    cached_list = module.cached_list

    def first_images(listing: ImageList, *rest: object) -> object:
        return cached_list(replace(listing, entries=listing.entries[:: max(1, len(listing) // FEW)]), *rest)

    monkeypatch.setattr(module, "cached_list", first_images)
    monkeypatch.setattr(TaskDataModule, "prefetch_test", lambda self: None)  # a process that would decode all
    found, known = [(package, list(package.__path__)) for package in (backbones, methods)], set(sys.modules)
    folder, pipes = tmp_path / "folder", tmp_path / "pipes"
    folder.mkdir()
    (folder / "data").symlink_to(data)
    pipes.mkdir()
    yield Place(folder, pipes)
    for package, folders in found:
        package.__path__[:] = folders
    registered.cache_clear()
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, place: Place, request: pytest.FixtureRequest) -> None:
    for snippet in snippets_of(page):
        if snippet.slow and not request.config.getoption("exhaustive"):
            continue
        assert snippet.language in ("bash", "python") or snippet.file, (
            f"{page.name}: a {snippet.language} block cannot run"
        )
        place.use(snippet)


@pytest.mark.parametrize(
    "language, code",
    [("bash", "false"), ("bash", "mambapeft fly"), ("python", "raise AssertionError"), ("bash", "ls x")],
)
def test_a_block_that_fails_is_found(language: str, code: str, place: Place) -> None:
    with pytest.raises(AssertionError):
        place.use(Snippet(language, code, None))


def test_the_command_line_has_arguments_output_and_folder_of_the_block(place: Place) -> None:
    place.use(Snippet("bash", 'mkdir a && cd a && mambapeft --version > b && [ "$(cat b)" != "" ]', None))
    place.use(Snippet("bash", "mambapeft methods 'lora_p_x' | grep -q LoRA", None))
    assert (place.folder / "a" / "b").is_file()


def test_tutorials_have_snippets() -> None:
    found = {page.stem for page in WITH_SNIPPETS}
    assert {"demo", "own-images", "write-a-method", "bring-a-backbone"} <= found


def test_every_mark_is_understood() -> None:
    """A mark with a typing mistake would silently be no snippet."""
    for page in pages():
        assert page.read_text(encoding="utf-8").count("<!-- snippet") == len(snippets_of(page)), page
