"""Tables, pages and plots say which of their results are not of the images, weights and method files of now."""

import shutil

import pytest
from helpers import runs
from safetensors.torch import load_file, save_file

from mambapeft_vision import cli
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.results.record import read_record
from mambapeft_vision.results.tables import Found
from mambapeft_vision.run.outdated import outdated_note

METHOD = """
from mambapeft_vision.methods.lora import LoRA

class Own(LoRA):
    def __init__(self) -> None:
        super().__init__(targets="in_proj", rank=2)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run on a task, weights and a method file of one's own."""
    folder = tmp_path_factory.mktemp("outdated")
    task = runs.lay_out_task(folder / "task")
    backbone = create_backbone("vim_pico_patch8_32", depth=2, embed_dim=32, weights="random")
    save_file(backbone.state_dict(), folder / "w.safetensors")
    (folder / "code").mkdir()
    (folder / "code" / "own_outdated.py").write_text(METHOD)
    tiny = runs.overrides(task, folder / "out", "trainer.max_epochs=1", "paths.cache=null")
    runs.run(
        [
            "method=linear_probe",
            "+method.own._target_=mambapeft_vision.methods.own_outdated.Own",
            f"paths.methods={folder / 'code'}",
            f"backbone.weights={folder / 'w.safetensors'}",
            *(word for word in tiny if not word.startswith("method.")),
        ]
    )
    return folder


def change(folder, what):
    if what == "images":
        (folder / "task" / "test.txt").write_text((folder / "task" / "test.txt").read_text().replace(" 1\n", " 2\n"))
    elif what == "weights of the backbone":
        tensors = load_file(folder / "w.safetensors")
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "w.safetensors")
    else:
        (folder / "code" / "own_outdated.py").write_text(METHOD.replace("rank=2", "rank=4"))


@pytest.fixture
def restored(finished, tmp_path):
    """`finished`, put back after a test."""
    kept = shutil.copytree(finished, tmp_path / "kept")
    yield finished
    shutil.rmtree(finished)
    shutil.copytree(kept, finished)


@pytest.mark.parametrize("what", ["images", "weights of the backbone", "method files"])
def test_what_has_changed_is_named(restored, what):
    run = runs.only_run_folder(restored / "out")
    found = [Found(read_record(run), run), Found(read_record(run))]
    assert outdated_note(found) == ""
    change(restored, what)
    assert outdated_note(found).startswith(
        f"1 of 2 results were made from inputs that have changed since: 1 of other {what};"
    )


def test_what_is_not_there_is_not_compared(restored):
    run = runs.only_run_folder(restored / "out")
    for name in ("task", "code"):
        shutil.rmtree(restored / name)
    (restored / "w.safetensors").unlink()
    assert outdated_note([Found(read_record(run), run)]) == ""


@pytest.mark.parametrize("command", ["tables", "report --out=R", "explore --out=page.html"])
def test_commands_that_show_results_say_so(restored, monkeypatch, tmp_path, capsys, command):
    monkeypatch.chdir(tmp_path)
    words = [*command.split(), str(restored / "out")]
    cli.main(words)
    assert "have changed since" not in capsys.readouterr().err
    change(restored, "images")
    cli.main(words)
    assert "1 of 1 results were made from inputs that have changed since: 1 of other images;" in capsys.readouterr().err
