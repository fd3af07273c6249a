"""Bad input ends with a message that names what, where and the remedy, with exit code 2 and no traceback."""

import shutil

import pytest
from helpers import crashes, runs
from helpers.bad_inputs import CASES, World

from mambapeft_vision.run.exit import USER_MISTAKE, describe_error, is_mistake


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A task and a finished run on it."""
    folder = tmp_path_factory.mktemp("bad_input")
    task = runs.lay_out_task(folder / "task")
    runs.run(runs.overrides(task, folder / "outputs", "trainer.max_epochs=1"))
    return task, runs.only_run_folder(folder / "outputs")


@pytest.fixture
def world(originals, tmp_path):
    task, run = originals
    (tmp_path / "empty").mkdir()
    return World(
        shutil.copytree(task, tmp_path / "data" / "task"), shutil.copytree(run, tmp_path / "run"), tmp_path / "empty"
    )


@pytest.mark.parametrize(("do", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_is_named_with_its_remedy(world, do, words):
    with pytest.raises(Exception) as error:
        do(world)
    message = describe_error(error.value)
    assert is_mistake(error.value), message  # which is how the commands leave with exit code 2
    assert "Traceback" not in message
    for word in words:
        assert word in message


def test_there_are_as_many_as_promised():
    assert len({name for name, _, _ in CASES}) == len(CASES) >= 150


@pytest.mark.parametrize(
    ("damage", "command", "words"),
    [
        (
            lambda world: (world.task / "test.txt").write_text("images/test/000000.png -1\n"),
            lambda world: ["train.py", *runs.overrides(world.task, world.folder / "outputs")],
            ["test.txt:1: label -1 is out of range", "Lay the task out"],
        ),
        (
            lambda world: (world.run / "adapter.safetensors").write_bytes(b"nothing"),
            lambda world: ["evaluate.py", f"run={world.run}", "device=cpu"],
            ["adapter.safetensors cannot be read", "copy it again"],
        ),
        (
            lambda world: (world.folder / "vtab.zip").write_text("no archive"),
            lambda world: [
                "scripts/prepare_vtab1k.py",
                "--zip",
                world.folder / "vtab.zip",
                "--root",
                world.folder / "x",
            ],
            ["vtab.zip is damaged or not a zip file", "download it again"],
        ),
    ],
    ids=["train", "evaluate", "prepare"],
)
def test_commands_say_it_and_leave_with_2(world, damage, command, words):
    damage(world)
    script, *arguments = command(world)
    code, _, err = crashes.command(world.folder, script, *map(str, arguments))
    assert code == USER_MISTAKE, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
