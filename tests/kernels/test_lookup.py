"""The lookup of pixels' values against its definition."""

import pytest
import torch
from mambapeft_kernels import look_up

CPU = [pytest.param("cpu", id="interpreter")] if not torch.cuda.is_available() else []
GPU = [pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
DEVICES = CPU + GPU
# Triton's interpreter cuts numbers off to bfloat16, where PyTorch and a GPU round them.
ROUNDING = [
    pytest.param(*p.values, dtype, id=f"{p.id}-{dtype}", marks=p.marks)
    for p in DEVICES
    for dtype in (torch.float32, torch.float16)
] + [pytest.param("cuda", torch.bfloat16, id="gpu-bfloat16", marks=pytest.mark.gpu)]


def drawn(shape, device):
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, generator=gen).to(device, torch.uint8)
    return images, torch.randn(shape[1], 256, generator=gen).to(device)


# One pixel; ragged; three channels of exactly, and of a little more than, a program's 2048 pixels; one channel.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (2, 3, 32, 64), (3, 3, 64, 65), (4, 1, 16, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), ROUNDING)
def test_values(device, dtype, shape):
    images, table = drawn(shape, device)
    found = look_up(images, table, dtype, backend="triton")
    expected = torch.stack([table[c][images[:, c].long()] for c in range(shape[1])], dim=1).to(dtype)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert torch.equal(look_up(images, table, dtype, backend="naive"), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_of_values_that_need_no_rounding(device):
    images, table = drawn((2, 3, 5, 7), device)
    table = table.bfloat16().float()
    found = look_up(images, table, torch.bfloat16, backend="triton")
    assert torch.equal(found, look_up(images, table, torch.bfloat16, backend="naive"))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_images(device):
    images, table = drawn((2, 3, 6, 8), device)
    expected = look_up(images, table, backend="triton")
    for other in (images.contiguous(memory_format=torch.channels_last), images.transpose(2, 3).contiguous().mT):
        assert not other.is_contiguous()
        assert torch.equal(look_up(other, table, backend="triton"), expected)
    assert look_up(images[:0], table, backend="triton").shape == (0, 3, 6, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_registered_op_is_consistent(device):
    images, table = drawn((2, 3, 5, 7), device)
    look_up(images, table, backend="triton")  # registers the op
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mambapeft.look_up, (images, table, torch.float16), test_utils=tests)


@pytest.mark.parametrize(
    ("images", "table", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 256), "images must be uint8 .*, got torch.float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 256), r"images must be uint8 \[B, C, H, W\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 256), r"table must be float32 \[3, 256\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 256).double(), "table must be float32"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(256, 3).T, "contiguous"),
    ],
)
def test_wrong_arguments_are_named(images, table, message):
    with pytest.raises(ValueError, match=message):
        look_up(images, table)
