"""The linear map with its low-rank branch against the same written out; and the copies of frozen weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mambapeft_vision.backbones.low_rank import add_low_rank, low_rank_linear
from mambapeft_vision.backbones.ports import PortedLinear

IN, OUT, RANK = 6, 10, 3


def tensors(rows: slice | None, bias: bool):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    width = OUT if rows is None else rows.stop - rows.start
    return draw(2, 5, IN), draw(OUT, IN), draw(OUT) if bias else None, draw(RANK, IN), draw(width, RANK)


def written_out(x, weight, bias, down, up, scale, dropout, rows):
    low = F.dropout(F.linear(x, down), dropout)
    out = F.linear(x, weight, bias)
    if rows is None:
        return out + scale * F.linear(low, up)
    return torch.cat([out[..., : rows.start], out[..., rows] + scale * F.linear(low, up), out[..., rows.stop :]], -1)


@pytest.mark.parametrize("rows", [None, slice(0, 4), slice(3, 10)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "dropout"), [(1.0, 0.0), (0.1, 0.0), (0.1, 0.4)])
def test_values_and_all_gradients(rows, bias, scale, dropout):
    inputs = tensors(rows, bias)
    results = []
    for function in (low_rank_linear, written_out):
        torch.manual_seed(1)  # the same dropout
        out = function(*inputs, scale, dropout, rows)
        wanted = [t for t in inputs if t is not None]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [None, slice(3, 10)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_second_branch_adds_to_the_first(rows, dropout):
    x, weight, _, down, up = tensors(rows, False)
    results = []
    for joined in (True, False):
        torch.manual_seed(1)
        out = F.linear(x, weight)
        if joined:
            out = add_low_rank(out, x, down, up, 0.1, dropout, rows)
        else:
            out = out + written_out(x, torch.zeros_like(weight), None, down, up, 0.1, dropout, rows)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, weight, down, up))])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_under_autocast_gradients_come_in_the_parameters_dtype():
    x, weight, _, down, up = (t if t is None else t.detach().float() for t in tensors(None, False))
    down.requires_grad_()
    up.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = low_rank_linear(x, weight, None, down, up, 0.5, 0.0, None)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert down.grad.dtype == up.grad.dtype == torch.float32
    expected = written_out(x, weight, None, down.detach(), up.detach(), 0.5, 0.0, None)
    assert (out.float() - expected).norm() < 1e-2 * expected.norm()


def test_a_frozen_weight_is_cast_once_and_again_when_it_changes():
    linear = PortedLinear(IN, OUT, bias=False, name="linear")
    linear.weight.requires_grad_(False)
    x = torch.randn(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        first = linear(x)
        kept = linear._narrow._copy
        linear(x)
        assert linear._narrow._copy is kept
        linear.weight.mul_(2)
        assert torch.equal(linear(x), 2 * first)
        assert torch.equal(copy.deepcopy(linear)(x), 2 * first)
    assert linear(x).dtype == torch.float32
