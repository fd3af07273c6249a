"""CUDA C++ kernels compile, and are compiled once a machine. NVRTC needs no GPU."""

import mambapeft_kernels.ahead as ahead
import pytest
import torch
from mambapeft_kernels import BlockSizes

pytest.importorskip("cuda.core", reason="NOT RUN: cuda-core is not installed")
pytest.importorskip("cuda.bindings.nvrtc", reason="NOT RUN: cuda-bindings, for the CUDA of PyTorch, is not installed")
from mambapeft_kernels import nvrtc

SOURCE = 'extern "C" __global__ void fill(float* x) {{ x[threadIdx.x] = {}; }}'


def test_what_was_compiled_before_comes_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = nvrtc._compiled(SOURCE.format(1), "sm_90")
    assert compiled.startswith(b"\x7fELF")
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "Program", None)
        assert nvrtc._compiled(SOURCE.format(1), "sm_90") == compiled
    for source, arch in ((SOURCE.format(2), "sm_90"), (SOURCE.format(1), "sm_80")):
        assert nvrtc._compiled(source, arch) != compiled


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, tests run these kernels")
@pytest.mark.parametrize("states", [5, 16, 22, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreter_every_kernel_compiles(states, dtype, tmp_path, monkeypatch):
    compiled = []

    def compile_only(files, name, macros, *_):
        for arch in ("sm_80", "sm_90"):
            assert name.encode() in nvrtc._compiled(nvrtc._source(files, tuple(macros.items())), arch)
        compiled.append(name)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "run", compile_only)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    sizes = BlockSizes(width=8, channels=16, states=states, rank=2, taps=4)
    for task in ahead.tasks(sizes, 0.5, dtype, torch.device("cpu"), "cuda")[:6]:  # the mixer's
        task()
    assert sorted(set(compiled)) == ["conv_backward", "conv_forward", "scan_backward", "scan_forward"]
