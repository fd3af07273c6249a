"""The same runs on a GPU."""

import concurrent.futures
import re

import pytest
import torch
from helpers import faults, runs

from mambapeft_vision.run import assemble
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.utils.errors import UserError

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
    record, folder = run_on_gpu(task, tmp_path, "trainer.precision=fp32")
    evaluation = evaluate(runs.compose_root("evaluate", [f"run={folder}", "device=cpu"]))
    assert evaluation["loss"] == pytest.approx(record.loss, rel=1e-3)


def test_two_runs_are_equal_bit_for_bit(task, tmp_path):
    folders = [run_on_gpu(task, tmp_path / place)[1] for place in ("one", "two")]
    one, two = (runs.read_adapter_tensors(folder) for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)


# The captured step


def test_a_captured_run_equals_a_launched_one_bit_for_bit(task, tmp_path):
    """Dropout, drop path and a partial last batch included."""
    folders = [run_on_gpu(task, tmp_path / str(on), f"trainer.cuda_graph={on}")[1] for on in (True, False)]
    captured, launched = (runs.read_adapter_tensors(folder) for folder in folders)
    assert all(torch.equal(captured[name], launched[name]) for name in captured)
    rows = [[(row["loss"], row["accuracy"]) for row in runs.read_metrics(folder)] for folder in folders]
    assert rows[0] == rows[1]


def test_an_interrupted_captured_run_goes_on_to_the_same_weights(task, tmp_path):
    _, whole = run_on_gpu(task, tmp_path / "whole", "trainer.checkpoint_every_s=0")
    command = runs.overrides(task, tmp_path / "parts", "trainer.device=cuda", "trainer.checkpoint_every_s=0")
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        runs.run(command, faults.raises(RuntimeError("interrupted by the test"), 14))
    runs.run(command)
    one, two = runs.read_adapter_tensors(whole), runs.read_adapter_tensors(runs.only_run_folder(tmp_path / "parts"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(task, tmp_path, precision):
    """A learning rate that throws the weights out of float32's range within a few steps."""
    absurd = ["trainer.learning_rate=1e30", "trainer.warmup_epochs=0", "trainer.clip_norm=null"]
    with pytest.raises(
        UserError, match=r"in step \d+ \(epoch 1\) of lora_p_x on custom/tiny; largest gradient norm"
    ) as e:
        run_on_gpu(task, tmp_path, f"trainer.precision={precision}", *absurd)
    step = int(re.search(r"in step (\d+)", str(e.value))[1])
    with pytest.raises(UserError, match=rf"in step {step} "):
        run_on_gpu(task, tmp_path / "launched", f"trainer.precision={precision}", "trainer.cuda_graph=false", *absurd)


LOOKS_AT_THE_HOST = '''
from mambapeft_vision.methods.lora import LoRA

class Looks(LoRA):
    """Asks the device for a number in every forward pass, which a captured step cannot do."""

    def attach(self, model):
        super().attach(model)
        model.register_forward_pre_hook(lambda module, inputs: float(inputs[0].sum()) and None)
'''


def test_a_step_that_cannot_be_captured_is_launched_and_says_so(task, tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "looks.py").write_text(LOOKS_AT_THE_HOST)
    own = [
        f"paths.methods={tmp_path / 'methods'}",
        "~method.lora_p_x",
        "+method.looks._target_=mambapeft_vision.methods.looks.Looks",
        "+method.looks.targets=layers.*.mixer.in_proj.weight",
        "+method.looks.rank=2",
    ]
    record, folder = run_on_gpu(task, tmp_path / "outputs", *own)
    assert record.accuracy > 0.5
    assert "cannot be captured as a CUDA graph" in (folder / "train.log").read_text()


def test_bf16_follows_fp32_for_a_hundred_steps(task, tmp_path):
    """Stated band: each epoch's mean loss within 3 %. (Dropout draws differently in another dtype: there is none.)"""
    rows = []
    for precision in ("bf16", "fp32"):
        more = ["trainer.max_epochs=20", "dataset.batch_size=8", "method.lora_p_x.dropout=0"]
        _, folder = run_on_gpu(task, tmp_path / precision, f"trainer.precision={precision}", *more)
        rows.append([float(row["loss"]) for row in runs.read_metrics(folder)])
    assert len(rows[0]) == 20 and 20 * -(-runs.TRAIN_IMAGES // 8) >= 100
    assert rows[0] == pytest.approx(rows[1], rel=0.03)


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_thirty_steps_with_kernels_and_with_the_definition_give_the_same_losses(task, tmp_path, kernel):
    """A small Vim of which projections, convolution, A and the branches are trained: gradients of every kind."""
    losses = []
    for backend in (kernel, "naive"):
        more = ["method=[lora_p_x,a,conv1d,lora_x_proj]", "trainer.max_epochs=10", "trainer.learning_rate=1e-3"]
        command = ["trainer.precision=fp32", f"kernel={backend}", *more]
        record, folder = run_on_gpu(task, tmp_path / backend, *command)
        assert record.kernel != "naive" or backend == "naive"
        losses.append([float(row["loss"]) for row in runs.read_metrics(folder)])
    assert len(losses[0]) == 10 and 10 * -(-runs.TRAIN_IMAGES // 16) == 30
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_default_precision_is_bf16(task, tmp_path):
    record, _ = run_on_gpu(task, tmp_path, "trainer.precision=auto")
    assert record.precision == "bf16"


# Compilation


def test_what_a_run_launches_is_compiled_ahead_of_its_first_step(task, tmp_path, monkeypatch):
    from mambapeft_kernels import nvrtc
    from triton.runtime.jit import JITFunction

    compiled, ahead = [], []

    def noted(function, name):
        def wrapped(*arguments, **keywords):
            compiled.append(name(*arguments))
            return function(*arguments, **keywords)

        return wrapped

    def wait(futures):
        concurrent.futures.wait(futures)
        assert [future.exception() for future in futures] == [None] * len(futures) != []
        ahead.extend(compiled)

    triton_name, cuda_name = (lambda kernel, *_: kernel.__name__), (lambda source, *_: source.split("\n")[0])
    monkeypatch.setattr(JITFunction, "_do_compile", noted(JITFunction._do_compile, triton_name))
    monkeypatch.setattr(nvrtc, "machine_code", noted(nvrtc.machine_code, cuda_name))
    monkeypatch.setattr(assemble, "wait", wait)
    # Sizes that no other test has, so that this process cannot have compiled for them before.
    run_on_gpu(task, tmp_path, "+backbone.d_state=7", "+backbone.dt_rank=5", "++backbone.embed_dim=112")
    assert len(ahead) >= 8 and compiled[len(ahead) :] == []
