"""The command `mambapeft`: light, complete, with one dialect and one way to end."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import runs

import mambapeft_vision
from mambapeft_vision import cli
from mambapeft_vision.run.arguments import ArgumentParser, positive
from mambapeft_vision.run.exit import CRASH, USER_MISTAKE, run_cli
from mambapeft_vision.utils.errors import INTERRUPTED, UserError


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys; from mambapeft_vision import cli; cli.main([]); "
        "from mambapeft_vision.commands import convert, export; convert.parser(), export.parser(); "
        "print([name for name in ('torch', 'timm', 'lightning', 'matplotlib') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


def test_every_module_of_commands_is_a_command():
    files = {file.stem for file in (runs.ROOT / "mambapeft_vision" / "commands").glob("*.py")}
    helpers = {"__init__", "hydra_app", "prepare_mini", "prepare_published"}
    assert files - helpers == {command.replace("-", "_") for command in cli.COMMANDS}


@pytest.mark.parametrize("command", [*cli.COMMANDS, "prepare mini", "prepare vtab1k", "prepare fgvc", "convert merge"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
        sys.exit(0)  # Hydra's help returns
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert command.split()[-1] in out and len(out.splitlines()) > 4


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == mambapeft_vision.__version__


def test_the_package_is_the_command_too(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mambapeft", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("mambapeft_vision", run_name="__main__")
    assert caught.value.code in (None, 0) and capsys.readouterr().out.strip() == mambapeft_vision.__version__


@pytest.mark.parametrize(
    "line, message",
    [
        ("trian", "trian is no command; did you mean train"),
        ("--versoin", "unrecognized arguments: --versoin"),
        ("prepare vtab", "vtab is no set of images; did you mean vtab1k"),
        ("methods lora_px", "lora_px is no method; did you mean lora_p_x"),
        ("tables nowhere", "nowhere does not exist"),
        ("tables --formt md", "unrecognized arguments: --formt"),
        ("cache nowhere", "nowhere is no folder"),
        ("rerun", "the following arguments are required: result"),
        ("rerun nowhere", "nowhere cannot be read"),
        ("sweep --wokers 2", "--wokers is unknown; did you mean --workers"),
        ("convert merge", "the following arguments are required: adapter"),
    ],
)
def test_mistakes_are_named(line, message):
    with pytest.raises(UserError, match=message):
        cli.main(line.split())


def test_methods_are_listed_and_described(capsys):
    cli.main(["methods"])
    listed = capsys.readouterr().out
    assert all(f"\n{file.stem} " in f"\n{listed}" for file in (runs.CONFIGS / "method").glob("*.yaml"))
    cli.main(["methods", "lora_p_x", "hybrid"])
    out = capsys.readouterr().out
    assert "lora_p_x: " in out and "1,769,472 parameters on vim_s" in out and "hybrid: " in out


def test_methods_that_fit_a_backbone_are_listed_and_the_others_explained(capsys):
    cli.main(["methods", "backbone=vit_s"])
    fitting, others = capsys.readouterr().out.split("\nThese do not fit vit_s:\n")
    names = [{line.split()[0] for line in part.splitlines()} for part in (fitting.partition(":\n")[2], others)]
    assert names[0] | names[1] == {file.stem for file in (runs.CONFIGS / "method").glob("*.yaml")}
    assert {"lora_qv", "svp", "vpt_deep", "lst"} <= names[0] and {"affix", "memba", "lora_p_x"} <= names[1]
    assert re.search(r"lora_p_x +\S.*has no 'in_proj'", others) and re.search(r"affix +\S.*use a Vim backbone", others)


# The doors


def doors() -> list[Path]:
    files = [runs.ROOT / "train.py", runs.ROOT / "evaluate.py", *sorted((runs.ROOT / "scripts").glob("*.py"))]
    return [file for file in files if "mambapeft_vision.cli" in file.read_text()]


@pytest.mark.parametrize("door", doors(), ids=lambda file: file.stem)
def test_a_door_is_a_command_and_nothing_else(door):
    text = door.read_text()
    (call,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    command, *rest = [ast.literal_eval(argument) for argument in call.args]
    assert command in cli.COMMANDS and rest in ([], ["mini"], ["vtab1k"])
    assert len(text.splitlines()) <= 6


# Options and overrides


def parser() -> ArgumentParser:
    parser = ArgumentParser("x")
    parser.add_argument("--workers", type=positive)
    parser.add_argument("--dry-run", action="store_true")
    return parser


def test_options_are_taken_out_of_overrides_wherever_they_stand():
    line = "method=a --workers 2 ~trainer.clip_norm --dry-run +backbone.depth=2 dataset.num_workers=3"
    options, overrides = parser().parse_with_overrides(line.split())
    assert (options.workers, options.dry_run) == (2, True)
    assert overrides == ["method=a", "~trainer.clip_norm", "+backbone.depth=2", "dataset.num_workers=3"]
    assert parser().parse_with_overrides(["workers=2"])[0].workers == 2


@pytest.mark.parametrize(
    "word, message",
    [
        ("workers=0", "workers: '0'; expected a whole number of at least 1"),
        ("workers=1.5", "workers: '1.5'"),
        ("--worker=2", "--worker is unknown|--worker=2 is unknown; did you mean --workers"),
        ("method", "method is unknown; expected key=value"),
    ],
)
def test_other_words_are_refused(word, message):
    with pytest.raises(UserError, match=message):
        parser().parse_with_overrides([word])


# How commands end


@pytest.mark.parametrize(
    "end, code, said",
    [
        (lambda: None, None, ""),
        (lambda: 0, None, ""),
        (lambda: CRASH, CRASH, ""),
        (lambda: int("x"), CRASH, "error: ValueError: invalid literal"),
        (lambda: mistake(), USER_MISTAKE, "error: a mistake"),
        (lambda: interrupt(), INTERRUPTED, "interrupted"),
    ],
    ids=["nothing", "0", "1", "crash", "mistake", "Ctrl-C"],
)
def test_exit_codes(end, code, said, capsys):
    if code is None:
        run_cli(end)
    else:
        with pytest.raises(SystemExit) as stop:
            run_cli(end)
        assert stop.value.code == code
    err = capsys.readouterr().err
    assert said in err and "Traceback (" not in err


def mistake():
    raise UserError("a mistake")


def interrupt():
    raise KeyboardInterrupt
