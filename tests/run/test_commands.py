"""train.py and evaluate.py as people start them: processes, killed, swept, misspelt."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from helpers import crashes, runs

from mambapeft_vision.results.record import is_finished, read_record

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(runs.ROOT / script), *arguments],
        cwd=runs.ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=runs.heed_ctrl_c,
    )


def call(
    script: str, *arguments: str, cwd: Path = runs.ROOT, environment: dict[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    """As `start`, but forked from a process with everything imported, until its end."""
    code, out, err = crashes.command(cwd, script, *arguments, environment=environment)
    return subprocess.CompletedProcess([script, *arguments], code, out, err)


def epochs_on_disk(outputs: Path) -> int:
    files = list(outputs.glob("*/*/*/*/metrics.csv"))
    return len(files[0].read_text().splitlines()) - 1 if files else 0


def kill_when(process: BaseProcess, outputs: Path, epochs: int, delay: float) -> None:
    """SIGKILL `delay` seconds after metrics.csv has this many rows."""
    while epochs_on_disk(outputs) < epochs:
        assert process.is_alive(), process.exitcode
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_run_killed_again_and_again_ends_with_the_same_bits(task, tmp_path):
    """Dropout and drop path are on; 24 epochs, so that kills land in the middle of training."""
    more = ("trainer.max_epochs=24", "+backbone.drop_path_rate=0.2", "method.lora_p_x.dropout=0.2")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    uninterrupted = crashes.begin(tmp_path, "train.py", *runs.overrides(task, whole, *more))
    for epochs, delay in ((1, 0.0), (6, 0.02), (14, 0.05)):
        begun = crashes.begin(tmp_path, "train.py", *runs.overrides(task, pieces, *more))
        kill_when(begun.process, pieces, epochs, delay)
        assert not is_finished(runs.only_run_folder(pieces))
    finish = call("train.py", *runs.overrides(task, pieces, *more))
    assert finish.returncode == 0, finish.stderr
    assert "continues from" in finish.stdout
    assert uninterrupted.end()[0] == 0

    folders = [runs.only_run_folder(outputs) for outputs in (whole, pieces)]
    expected, resumed = (runs.read_adapter_tensors(folder) for folder in folders)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    losses, resumed_losses = ([row["loss"] for row in runs.read_metrics(folder)] for folder in folders)
    assert losses == resumed_losses and len(losses) == 24
    records = [read_record(folder) for folder in folders]
    assert (records[0].accuracy, records[0].loss) == (records[1].accuracy, records[1].loss)


def test_ctrl_c_stops_at_once_and_says_how_to_continue(task, tmp_path):
    process = start("train.py", *runs.overrides(task, tmp_path, "trainer.max_epochs=100000"))
    while not epochs_on_disk(tmp_path):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in err and "Traceback" not in err
    assert not is_finished(runs.only_run_folder(tmp_path))


def test_a_sweep_goes_on_after_a_failing_job_and_reports_it(task, tmp_path):
    command = runs.overrides(task, tmp_path, "trainer.max_epochs=1", "trainer.warmup_epochs=0")
    sweep = call("train.py", "-m", *command, "method.lora_p_x.rank=2,0,3")
    assert sweep.returncode == 2
    results = sorted(tmp_path.glob("custom/tiny/lora_p_x/*/result.json"))
    assert sorted(read_record(file).config["method"]["lora_p_x"]["rank"] for file in results) == [2, 3]
    assert "1 of the runs failed:" in sweep.stderr
    (failure,) = sweep.stderr.partition("failed:\n")[2].splitlines()
    assert "method.lora_p_x.rank=0 " in failure and "LoRA: rank=0; expected a whole number >= 1" in failure
    assert "Traceback" not in sweep.stderr


def test_wandb_without_a_login_is_a_readable_error(task, tmp_path):
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    result = call("train.py", *runs.overrides(task, tmp_path, "logger=wandb"), environment=environment)
    assert result.returncode == 2
    assert "logger.mode=offline" in result.stderr and "Traceback" not in result.stderr


def test_evaluate_command(finished):
    result = call("evaluate.py", f"run={finished.folder}", "device=cpu")
    assert result.returncode == 0, result.stderr
    assert f"accuracy {finished.record.accuracy:.2%}" in result.stdout
    assert f"recorded {finished.record.accuracy:.2%}" in result.stdout


def test_dry_run_needs_neither_data_nor_weights(tmp_path):
    result = call("train.py", "dry_run=true", f"paths.data={tmp_path}", f"paths.outputs={tmp_path / 'outputs'}")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    (down,) = (line.split() for line in lines if "in_proj.weight.down" in line)
    assert down == ["lora_p_x", "layers.*.mixer.in_proj.weight.down", "24", "64x384", "589,824", "1", "1"]
    assert "trained: 1,769,472 and the head 38,500; frozen: 25,411,584" in result.stdout
    assert "AdamW, lr 0.001" in result.stdout and "kernel " in result.stdout
    assert f"run folder {tmp_path / 'outputs' / 'vtab' / 'cifar' / 'lora_p_x'}" in result.stdout
    assert not (tmp_path / "outputs").exists()


def test_help_shows_groups_and_examples():
    started = time.monotonic()
    process = start("train.py", "--help")
    out, _ = process.communicate(timeout=120)
    assert time.monotonic() - started < 20
    assert process.returncode == 0
    for group in ("backbone", "dataset/vtab", "dataset/demo", "experiment", "logger", "method", "trainer"):
        assert any(line.startswith(f"{group}: ") for line in out.splitlines()), group
    options = {file.stem for file in (runs.CONFIGS / "method").glob("*.yaml")}
    (listed,) = (line for line in out.splitlines() if line.startswith("method: "))
    assert set(listed.removeprefix("method: ").split(", ")) == options
    assert out.count("  mambapeft train ") >= 5


def test_help_of_evaluate():
    result = call("evaluate.py", "--help")
    assert result.returncode == 0 and "run: ???" in result.stdout


def test_cfg_job_shows_the_tree():
    result = call("train.py", "--cfg", "job", "experiment=demo")
    assert result.returncode == 0
    assert "name: vim_nano_patch8_64" in result.stdout and "hydra:" not in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trainer.max_epoch=3"], "trainer.max_epoch: Key 'max_epoch' not in 'TrainerConfig'; did you mean max_epochs"),
        (["method=lora_px"], "Could not find 'method/lora_px'; did you mean lora_p_x"),
        (["dataset=folder"], "dataset.folder=None, dataset.path=None: expected dataset.path=DIR"),
        (["-m", "sed=0,1"], "sed: Key 'sed' not in 'TrainConfig'; did you mean seed"),
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(tmp_path, arguments, message):
    result = call("train.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_a_command_leaves_nothing_but_its_outputs_folder(task, tmp_path):
    command = runs.overrides(task, Path("outputs"), "trainer.max_epochs=1")
    assert call("train.py", "-m", *command, "seed=0", cwd=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
