"""Capturing, on a GPU; and, anywhere, each name that PyTorch does not document and captured steps stand on."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mambapeft_vision.engine import cuda_graph

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, which is not here")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def fused_step(flag: float) -> torch.Tensor:
    """What a fused AdamW makes of a parameter of ones, with a gradient of ones."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0, fused=True)
    cuda_graph.skip_where(optimizer, torch.tensor(flag))
    parameter.grad = torch.ones(3)
    optimizer.step()
    return parameter.detach()


def test_found_inf_skips_a_step_of_a_fused_optimiser():
    torch.testing.assert_close(fused_step(0.0), torch.full((3,), 0.9))
    assert torch.equal(fused_step(1.0), torch.ones(3))


def test_a_group_is_capturable_on_a_gpu_only_and_keeps_its_rate():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.25), capturable=True, foreach=False)
    cuda_graph.fit_to_device(optimizer, CPU)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.25 and type(group["lr"]) is float and group["capturable"] is False


def test_a_seed_is_that_of_manual_seed_which_is_not_called(monkeypatch):
    torch.manual_seed(7)
    wanted = torch.rand(5)
    monkeypatch.setattr(
        torch, "manual_seed", lambda _: pytest.fail("it keeps a call for every device that is not there")
    )
    cuda_graph.seed(CPU, 7)
    assert torch.equal(torch.rand(5), wanted)


def test_generators_have_what_a_failed_capture_needs():
    assert isinstance(torch.cuda.default_generators, tuple)
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph.__init__).parameters
    assert callable(torch.Generator().graphsafe_set_state)


def test_the_first_cause_is_named():
    try:
        try:
            raise ValueError("the cause\nand more")
        except ValueError:
            raise RuntimeError("what it led to")  # noqa: B904 (as PyTorch does it)
    except RuntimeError as error:
        assert cuda_graph.first_cause(error) == "ValueError: the cause"


def test_where_nothing_is_captured_every_step_is_launched():
    calls = []
    step = cuda_graph.GraphedStep(
        lambda rows, whole: calls.append((len(rows), whole)), lambda: None, CPU, enabled=True, warm_up=1, note=print
    )
    for rows in (2, 2, 1):
        step(torch.zeros(rows), constants=(7,))
    assert calls == [(2, 7), (2, 7), (1, 7)] and not step.is_captured


# On a GPU


@pytest.mark.gpu
@on_gpu
def test_a_graph_computes_on_new_inputs_and_on_fewer_rows():
    graph = cuda_graph.capture(lambda rows: 2 * rows + 1, torch.zeros(4, 3, device=GPU), device=GPU)
    for rows in (4, 2):
        values = torch.randn(rows, 3, device=GPU)
        assert torch.equal(graph.replay(values)[:rows], 2 * values + 1)


@pytest.mark.gpu
@on_gpu
def test_work_that_waits_for_the_device_cannot_be_captured_and_the_device_is_fit_afterwards():
    with pytest.raises(cuda_graph.CaptureError):
        cuda_graph.capture(lambda rows: float(rows.sum()), torch.zeros(4, device=GPU), device=GPU)
    cuda_graph.seed(GPU, 3)
    one = torch.rand(5, device=GPU)
    cuda_graph.seed(GPU, 3)
    assert torch.equal(torch.rand(5, device=GPU), one)


@pytest.mark.gpu
@on_gpu
def test_a_seed_decides_what_the_next_replay_draws():
    """Not the seed at the time of the capture."""
    drawn = torch.zeros(5, device=GPU)
    cuda_graph.seed(GPU, 7)

    def draw() -> None:
        drawn.copy_(torch.rand(5, device=GPU))

    draw()
    graph = cuda_graph.capture(draw, device=GPU)
    found = []
    for value in (3, 3, 4):
        cuda_graph.seed(GPU, value)
        graph.replay()
        found.append(drawn.clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.gpu
@on_gpu
def test_a_step_is_captured_once_warm_for_each_size_and_is_the_same():
    parameter = nn.Parameter(torch.ones(3, device=GPU))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    cuda_graph.fit_to_device(optimizer, GPU)

    def take(rows: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        (rows * parameter).sum().backward()
        optimizer.step()

    def final(enabled: bool) -> torch.Tensor:
        optimizer.state.clear()
        parameter.data.fill_(1.0)
        step = cuda_graph.GraphedStep(
            take, lambda: optimizer.zero_grad(set_to_none=True), GPU, enabled=enabled, warm_up=2, note=pytest.fail
        )
        with torch.cuda.stream(torch.cuda.Stream(GPU)):
            for rows in (4, 4, 2, 4, 4, 2, 2):
                step(torch.arange(3 * rows, dtype=torch.float32, device=GPU).view(rows, 3))
            torch.cuda.synchronize()
        assert step.is_captured == enabled
        step.release()
        return parameter.detach().clone()

    assert torch.equal(final(enabled=True), final(enabled=False))


@pytest.mark.gpu
@on_gpu
def test_a_step_that_cannot_be_captured_is_launched_and_says_so_once():
    notes, calls = [], []
    step = cuda_graph.GraphedStep(
        lambda rows: calls.append(float(rows.sum())), lambda: None, GPU, enabled=True, warm_up=1, note=notes.append
    )
    for _ in range(4):
        step(torch.ones(2, device=GPU))
    assert calls == [2.0] * 4 and len(notes) == 1 and "cannot be captured as a CUDA graph" in notes[0]


def test_no_other_code_captures():
    package = Path(cuda_graph.__file__).parents[1]
    capturing = {file for file in package.rglob("*.py") if re.search(r"cuda\.(CUDAGraph\(|graph\()", file.read_text())}
    assert capturing == {Path(cuda_graph.__file__)}
