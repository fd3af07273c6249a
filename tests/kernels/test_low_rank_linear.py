"""The linear map with its low-rank branch against the same written out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mambapeft_kernels.low_rank.linear import LowRankFactors, add_low_rank, low_rank_linear

from mambapeft_vision.backbones.layers import PortedLinear
from mambapeft_vision.backbones.ports import FunctionBranch, LowRankBranch

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


def joined(x, weight, bias, down, up, *settings):
    return low_rank_linear(x, weight, bias, [LowRankFactors(down, up, *settings)])


@pytest.mark.parametrize("rows", [None, slice(0, 4), slice(3, 10)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "dropout"), [(1.0, 0.0), (0.1, 0.0), (0.1, 0.4)])
def test_values_and_all_gradients(rows, bias, scale, dropout):
    inputs = tensors(rows, bias)
    results = []
    for function in (joined, written_out):
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
    for added in (True, False):
        torch.manual_seed(1)
        out = F.linear(x, weight)
        if added:
            out = add_low_rank(out, x, [LowRankFactors(down, up, 0.1, dropout, rows)])
        else:
            out = out + written_out(x, torch.zeros_like(weight), None, down, up, 0.1, dropout, rows)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, weight, down, up))])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", ["linear", "add"])
@pytest.mark.parametrize("needed", [(True, True), (False, True), (True, False)])
def test_branches_beside_each_other_are_the_same_one_by_one(function, needed):
    """Ranks 3 and 2, whole and partial rows that overlap, scales of their own; without dropout, so that draws agree."""
    x, weight, _, down, up = tensors(None, False)
    generator = torch.Generator().manual_seed(3)
    second = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, IN), (4, 2))]
    down.requires_grad_(needed[0])
    second[1].requires_grad_(needed[1])
    branches = [LowRankFactors(down, up, 0.1, 0.0, None), LowRankFactors(*second, 2.0, 0.0, slice(3, 7))]
    results = []
    for together in (True, False):
        if together and function == "linear":
            out = low_rank_linear(x, weight, None, branches)
        else:
            out = F.linear(x, weight)
            for group in [branches] if together else [[branch] for branch in branches]:
                out = add_low_rank(out, x, group)
        wanted = [t for t in (x, weight, down, up, *second) if t.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_branches_beside_each_other_draw_dropout_of_their_own():
    """Written out with the mask that the one draw for both gives, each branch has its own columns of it."""
    x, weight, _, down, up = tensors(None, False)
    branches = [LowRankFactors(down, up, 0.1, 0.4, None)] * 2
    torch.manual_seed(1)
    found = low_rank_linear(x, weight, None, branches)
    torch.manual_seed(1)
    low = F.dropout(F.linear(x, torch.cat((down, down))), 0.4)
    expected = F.linear(x, weight) + 0.1 * F.linear(low, torch.cat((up, up), dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(low[..., :RANK], low[..., RANK:])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout_on", ["input", "middle"])
@pytest.mark.parametrize("rows", [None, slice(3, 10)])
def test_the_fused_products_are_what_the_branch_defines(rows, dropout_on, training):
    linear = PortedLinear(IN, OUT, bias=False, name="linear").double().train(training)
    x, _, _, down, up = tensors(rows, False)
    branch = LowRankBranch("owner", SimpleNamespace(down=down, up=up), 0.3, 0.4, dropout_on, rows)
    linear.side.add(branch)
    torch.manual_seed(1)
    found = linear(x)
    torch.manual_seed(1)
    expected = F.linear(x, linear.weight)
    expected[..., rows or slice(None)] += branch(x, training)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = (x, down, up)
    gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected))
    for ours, wanted in zip(*gradients):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_a_port_adds_branches_of_every_kind():
    linear = PortedLinear(IN, OUT, bias=False, name="linear").double()
    x, _, _, down, up = tensors(None, False)
    expected = F.linear(x, linear.weight)
    pair = SimpleNamespace(down=down, up=up)
    for number in range(3):
        dropout = 0.0 if number else 1e-300  # a rate of its own that drops nothing
        linear.side.add(LowRankBranch(f"owner{number}", pair, 0.1, dropout))
        expected = expected + 0.1 * F.linear(F.linear(x, down), up)
    linear.side.add(LowRankBranch("on the input", pair, 0.2, 0.0, "input"))
    expected = expected + 0.2 * F.linear(F.linear(x, down), up)
    linear.side.add(FunctionBranch("another", lambda x: x.sum(-1, keepdim=True), slice(2, 3)))
    expected[..., 2:3] += x.sum(-1, keepdim=True)
    torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)
    for branch in list(linear.side.branches):
        linear.side.remove(branch.owner)
    assert torch.equal(linear(x), F.linear(x, linear.weight))


def test_under_autocast_gradients_come_in_the_parameters_dtype():
    x, weight, _, down, up = (t if t is None else t.detach().float() for t in tensors(None, False))
    down.requires_grad_()
    up.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = joined(x, weight, None, down, up, 0.5, 0.0, None)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert down.grad.dtype == up.grad.dtype == torch.float32
    expected = written_out(x, weight, None, down.detach(), up.detach(), 0.5, 0.0, None)
    assert (out.float() - expected).norm() < 1e-2 * expected.norm()
