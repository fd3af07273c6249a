"""The same runs on a GPU."""

import pytest
import runs
import torch

from mambapeft_vision.training.evaluate import evaluate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, which is not here"),
]


def run_on_gpu(task, outputs, *more):
    record = runs.run(runs.overrides(task, outputs, "trainer.device=cuda", *more))
    return record, runs.only_run_folder(outputs)


def test_a_run_learns_as_on_the_cpu_and_is_recorded(finished, task, tmp_path):
    record, _ = run_on_gpu(task, tmp_path)
    assert record.device == "cuda:0" and record.device_name == torch.cuda.get_device_name(0)
    assert record.accuracy > 0.6
    # Dropout and drop path draw other numbers than on the CPU, so only the first epoch's loss is close.
    first = [
        float(runs.read_metrics(folder)[0]["loss"]) for folder in (runs.only_run_folder(tmp_path), finished.folder)
    ]
    assert first[0] == pytest.approx(first[1], rel=0.1)
    assert 2**20 < record.peak_memory_bytes < 2**30


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_evaluation_gives_the_recorded_accuracy(task, tmp_path, precision):
    record, folder = run_on_gpu(task, tmp_path, f"trainer.precision={precision}")
    evaluation = evaluate(runs.compose_root("evaluate", [f"run={folder}", "device=cuda"]))
    assert evaluation["accuracy"] == record.accuracy
    assert evaluation["loss"] == pytest.approx(record.loss, rel=1e-6)


def test_a_run_made_on_a_gpu_is_tested_on_the_cpu(task, tmp_path):
    record, folder = run_on_gpu(task, tmp_path)
    evaluation = evaluate(runs.compose_root("evaluate", [f"run={folder}", "device=cpu"]))
    assert evaluation["loss"] == pytest.approx(record.loss, rel=1e-3)


def test_two_runs_are_equal_bit_for_bit(task, tmp_path):
    folders = [run_on_gpu(task, tmp_path / place)[1] for place in ("one", "two")]
    one, two = (runs.read_adapter_tensors(folder) for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)
