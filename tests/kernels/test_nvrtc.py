"""CUDA C++ kernels compile, and are compiled once a machine. NVRTC needs no GPU."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mambapeft_kernels import BlockSizes, StageSizes
from mambapeft_kernels.compile_ahead import stage_tasks, tasks

pytest.importorskip("cuda.core", reason="NOT RUN: cuda-core is not installed")
pytest.importorskip("cuda.bindings.nvrtc", reason="NOT RUN: cuda-bindings, for the CUDA of PyTorch, is not installed")
from mambapeft_kernels import depthwise_conv_silu, nvrtc
from mambapeft_kernels.depthwise_conv2d import triton_kernels

SOURCE = 'extern "C" __global__ void fill(float* x) {{ x[threadIdx.x] = {}; }}'


def test_what_was_compiled_before_comes_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = nvrtc.machine_code(SOURCE.format(1), "sm_90")
    assert compiled.startswith(b"\x7fELF")
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "Program", None)
        assert nvrtc.machine_code(SOURCE.format(1), "sm_90") == compiled
    for source, arch in ((SOURCE.format(2), "sm_90"), (SOURCE.format(1), "sm_80")):
        assert nvrtc.machine_code(source, arch) != compiled


def compiled_variants() -> Iterator[Any]:
    """Numbers of states, dtypes, indices and GPUs: each at least once in a normal run, their product in a whole one."""
    kinds = [(states, dtype, "int") for states in (5, 16, 22, 32) for dtype in (torch.float32, torch.bfloat16)]
    variants = [(*kind, arch) for kind in [*kinds, (16, torch.bfloat16, "i64")] for arch in ("sm_80", "sm_90")]
    normal = [*variants[:-2:5], variants[-1]]
    for variant in variants:
        yield pytest.param(*variant, marks=[] if variant in normal else [pytest.mark.exhaustive])


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, tests run these kernels")
@pytest.mark.parametrize(("states", "dtype", "index", "arch"), compiled_variants())
def test_interpreter_every_kernel_compiles(states, dtype, index, arch, tmp_path, monkeypatch):
    compiled = []

    def compile_only(files, name, macros, *_):
        assert macros["INDEX"] == "int"
        macros["INDEX"] = index
        more = {"conv_backward": {"NEED_W": 1}, "scan_backward": {"NEED_DA": 1, "HAS_SO": 1}}.get(name, {})
        for chosen in (macros, macros | more):
            assert name.encode() in nvrtc.machine_code(nvrtc.source_of(files, tuple(chosen.items())), arch)
        compiled.append(name)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "run", compile_only)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    sizes = BlockSizes(width=8, channels=64, states=states, rank=2, taps=4)
    for task in tasks(sizes, 0.5, dtype, torch.device("cpu"), "cuda")[:2]:  # the mixer's
        task()
    tensor = dtype == torch.bfloat16 and states == 16
    assert set(compiled) == {
        *("conv_backward", "conv_forward", "scan_forward"),
        "scan_backward_tensor" if tensor else "scan_backward",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, tests run these kernels")
def test_interpreter_every_kernel_of_vmamba_compiles(tmp_path, monkeypatch):
    """As training launches them, and with every gradient and samples that are missing."""
    compiled = []

    def compile_only(files, name, macros, *_, shared=0):
        gradients = {key: 1 for key in macros if key.startswith("NEED_")}
        for chosen in (macros, macros | gradients | {key: 0 for key in ("EXACT",) if key in macros}):
            assert name.encode() in nvrtc.machine_code(nvrtc.source_of(files, tuple(chosen.items())), "sm_90")
        compiled.append((name, macros.get("MODE")))
        assert shared <= 227 << 10

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "run", compile_only)
    cuda_kernels = importlib.import_module("mambapeft_kernels.ss2d.cuda_kernels")
    # All directions in one block: nothing for Triton to do.
    monkeypatch.setattr(cuda_kernels, "WANTED_WARPS", {"forward": 1, "backward": 1})
    for name in ("ss2d", "depthwise_conv2d"):
        monkeypatch.setattr(importlib.import_module(f"mambapeft_kernels.{name}.api"), "backend_for", lambda *_: "cuda")
    sizes = StageSizes(3, 5, 8, 96, 1, 24)
    scans, _, convolution, *_ = stage_tasks((sizes,), torch.bfloat16, torch.device("cpu"), "cuda")
    scans()
    convolution()
    filters = torch.zeros(96, 1, 3, 3, requires_grad=True)  # their gradients need that of conv(x)
    maps = torch.zeros(4, 3, 5, 96, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr(triton_kernels, "filter_gradients", lambda g, x: torch.zeros(10, 96))
    depthwise_conv_silu(maps, filters, None, "cuda").backward(torch.zeros_like(maps))
    assert set(compiled) == {
        ("ss2d_forward", None),
        ("ss2d_backward", None),
        *(("depthwise", mode) for mode in range(3)),
        ("depthwise_back", 3),
    }


def test_indices_have_as_many_bits_as_the_largest_tensor_needs():
    small, large = torch.empty(4, 5, device="meta"), torch.empty(2**16, 2**15, device="meta")
    assert nvrtc.index_type(small, None)[0] == "int"
    assert nvrtc.index_type(small, large)[0] == "i64"
    assert nvrtc.index_type(large[:, :: 2**14][: 2**10])[0] == "int"  # few elements of a large one, near its start
    assert nvrtc.index_type(large[:, :1].expand(-1, 2**15)[: 2**12])[0] == "int"
    assert nvrtc.index_type(large[:: 2**16 - 1])[0] == "i64"  # two rows, far apart
