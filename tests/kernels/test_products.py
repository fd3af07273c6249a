"""Products in another dtype than their factors'."""

import pytest
import torch
from mambapeft_kernels import product

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_dtype(device, factors, batch, scale):
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*batch, *shape, generator=gen).to(device, factors) for shape in ((40, 70), (70, 24)))
    found = product(a.mT.contiguous().mT, b, torch.float32, scale)
    expected = scale * a.double() @ b.double()
    assert found.dtype == torch.float32 and found.shape == (*batch, 40, 24)
    rounded = device == "cpu" and factors != torch.float32  # where the sums can only be had in the factors' dtype
    assert (found - expected).norm() <= (torch.finfo(factors).eps if rounded else 1e-6) * expected.norm()
    same = product(a, b, factors, scale)
    assert same.dtype == factors and (same - expected).norm() <= 2 * torch.finfo(factors).eps * expected.norm()
