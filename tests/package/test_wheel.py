"""The wheel, installed where no checkout is in sight: the command, a tiny training and a prediction from Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import runs

ROOT = Path(__file__).resolve().parents[2]
TRAIN_AND_PREDICT = """
import torch
import mambapeft_vision as mv

print("--8<--")
logits = mv.load_adapter({folder!r}, weights="random").eval()(torch.zeros(2, 3, 32, 32))
result = mv.train(*{overrides!r})
print(tuple(logits.shape), result.task, result.methods, result.seed)
"""
OWN_METHOD = """
import torch
from torch import nn
from mambapeft_vision import Method


class Shift(Method):
    '''Adds a trained number to every logit.'''

    def attach(self, model):
        self.shift = nn.Parameter(torch.zeros(1))
        self.handle = model.head.register_forward_hook(lambda _, __, out: out + self.shift)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with nothing but the package: pip builds a wheel and installs that. It needs no network."""
    site = tmp_path_factory.mktemp("site")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", *options, f"--target={site}", str(ROOT)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return site


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def command(work) -> list[str]:
    task = runs.lay_out_task(work / "task")
    return runs.overrides(task, Path("outputs"), "trainer.max_epochs=1", "trainer.warmup_epochs=0")


def call(site: Path, work: Path, *line: str) -> str:
    """Calls a program that finds the wheel before anything else, and returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(site: Path, work: Path, code: str, *arguments: str) -> str:
    return call(site, work, sys.executable, "-c", code, *arguments)


def mambapeft(site: Path, work: Path, *arguments: str) -> str:
    return call(site, work, sys.executable, str(site / "bin" / "mambapeft"), *arguments)


@pytest.fixture(scope="module")
def trained(site, work, command) -> Path:
    """The folder of a run that the installed command has done."""
    assert "lora_p_x on custom/tiny" in mambapeft(site, work, "train", *command)
    (folder,) = (file.parent for file in (work / "outputs").glob("custom/tiny/lora_p_x/*/config.yaml"))
    return folder


@pytest.fixture(scope="module")
def said(site, work, command, trained) -> list[str]:
    """Where an installed package has its parts, what its command says of itself, and trainings: in one process."""
    own = work / "own"
    (own / "configs" / "method").mkdir(parents=True)
    (own / "shift.py").write_text(OWN_METHOD)
    (own / "configs" / "method" / "shift.yaml").write_text("shift: {_target_: mambapeft_vision.methods.shift.Shift}\n")
    options = [word for word in command if not word.startswith("method.")]
    train = ["train", *options, "method=shift", f"paths.methods={own}", "--config-dir", f"{own}/configs"]
    code = (
        "import mambapeft_kernels, mambapeft_vision\n"
        "from mambapeft_vision.cli import main\n"
        "from mambapeft_vision.utils.paths import configs_folder\n"
        "print(mambapeft_vision.__file__, mambapeft_kernels.__file__, configs_folder(), sep='\\n')\n"
        f"for arguments in (['--help'], ['train', '--help'], ['--version'], {train!r}):\n"
        "    print('--8<--')\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
    ) + TRAIN_AND_PREDICT.format(folder=str(trained), overrides=[*command, "seed=7"])
    return python(site, work, code).split("--8<--\n")


def test_everything_comes_from_the_wheel(site, said):
    places = said[0].splitlines()
    assert len(places) == 3 and all(Path(place).is_relative_to(site) for place in places)
    assert (site / "mambapeft_vision" / "py.typed").exists() and (site / "mambapeft_kernels" / "py.typed").exists()
    packed = {file.relative_to(site / "mambapeft_vision") for file in (site / "mambapeft_vision").rglob("*.yaml")}
    assert packed == {file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.yaml")}


def test_the_command_says_what_it_can_do(said):
    from mambapeft_vision import __version__
    from mambapeft_vision.cli import COMMANDS

    _, listed, of_train, version, *_ = said
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    assert version.strip() == __version__
    assert "method=[lora_out_proj,lora_p_x]" in of_train


def test_training_by_the_command_then_a_prediction_and_a_training_from_python(said):
    assert said[-1].splitlines()[-1] == f"(2, {runs.CLASSES}) custom/tiny ['lora_p_x'] 7"


def test_methods_and_configs_of_ones_own(said):
    assert "shift on custom/tiny" in said[-2]
