"""Which backend runs where, and what an impossible choice says."""

import subprocess
import sys

import mambapeft_kernels.backends as backends
import pytest
import torch
from helpers.kernel_cases import cast, make_directions
from mambapeft_kernels import BACKENDS, available_backends, describe, resolve_backend, ssm_mixer
from mambapeft_kernels.backends import resolve_for


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be a machine: `machine(gpu=True, modules={...}, capability=(9, 0))`."""

    def pretend(gpu=False, modules=(), capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(backends, "is_installed", lambda name: name in modules)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return pretend


@pytest.mark.parametrize(
    ("modules", "capability", "dtype", "expected"),
    [
        ({"triton", "cuda.core", "cuda.bindings"}, (9, 0), torch.bfloat16, "cuda"),
        ({"triton", "cuda.core", "cuda.bindings"}, (9, 0), torch.float16, "triton"),
        ({"triton", "cuda.core", "cuda.bindings"}, (9, 0), torch.float64, "torch"),
        ({"triton", "cuda.core", "cuda.bindings"}, (7, 5), torch.float32, "triton"),
        ({"triton"}, (9, 0), torch.float32, "triton"),
        ({"cuda.core", "mamba_ssm", "causal_conv1d"}, (9, 0), torch.float32, "torch"),
    ],
)
def test_auto_on_a_gpu(machine, modules, capability, dtype, expected):
    machine(gpu=True, modules=modules, capability=capability)
    assert resolve_backend("auto", "cuda", dtype) == expected


def test_auto_on_a_cpu_is_torch_even_where_the_interpreter_could_run(machine, monkeypatch):
    machine(modules={"triton"})
    assert available_backends("cpu") == ["torch", "naive"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("auto", "cpu") == "torch"
    assert resolve_backend("triton", "cpu") == "triton"


def test_the_choice_for_a_tensor_follows_the_interpreter(monkeypatch):
    x = torch.ones(1)
    for _ in range(2):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert resolve_for("triton", x) == "triton"
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="kernel=triton cannot run on cpu"):
            resolve_for("triton", x)


def test_the_choice_for_a_tensor_is_looked_up(monkeypatch):
    x = torch.ones(1)
    chosen = [resolve_for("auto", x), resolve_for("torch", x.double())]
    monkeypatch.setattr(backends, "can_run", None)
    assert [resolve_for("auto", x), resolve_for("torch", x.double())] == chosen


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("cuda", r"pip install cuda-core\[cu13\]"),
        ("triton", "TRITON_INTERPRET=1"),
        ("mamba_ssm", "pip install mamba-ssm"),
    ],
)
def test_impossible_choices_name_the_remedy(machine, name, remedy):
    machine()
    with pytest.raises(ValueError, match=f"kernel={name} cannot run on cpu.*{remedy}.*auto, torch, naive"):
        resolve_backend(name, "cpu")


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="kernel='fast' is unknown; choose one of auto, cuda, triton"):
        resolve_backend("fast", "cpu")


def test_unsupported_dtype_names_those_that_work(machine):
    machine(gpu=True, modules={"triton", "cuda.core", "cuda.bindings"})
    with pytest.raises(ValueError, match="kernel=cuda takes float32, bfloat16, got torch.float64"):
        resolve_backend("cuda", "cuda", torch.float64)


def test_describe_says_what_was_asked_and_what_runs(machine):
    machine()
    assert describe("auto", "cpu") == f"kernel torch (kernel=auto) on cpu: {BACKENDS['torch']}"
    assert describe("naive", "cpu").startswith("kernel naive on cpu")


def test_auto_on_a_gpu_says_what_would_be_faster(machine):
    machine(gpu=True, modules={"triton"})
    assert "kernel=cuda is faster: it needs" in describe("auto", "cuda")
    assert "faster" not in describe("triton", "cuda")
    machine(gpu=True, modules={"triton", "cuda.core", "cuda.bindings"})
    assert "faster" not in describe("auto", "cuda")


def test_import_needs_neither_triton_nor_cuda():
    """In a fresh interpreter where both are hidden, the package imports and the CPU path runs."""
    code = (
        "import sys\n"
        "for name in ('triton', 'cuda', 'numba'): sys.modules[name] = None\n"
        "import torch, mambapeft_kernels as k\n"
        "assert k.resolve_backend('auto', 'cpu') == 'torch'\n"
        "h, r = k.add_rms_norm(torch.ones(1, 2, 4), None, torch.ones(4))\n"
        "assert h.shape == (1, 2, 4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def call(**change):
    directions = cast(make_directions(6, 3, 2), torch.float32)
    arguments = {"xz": torch.ones(1, 2, 12), "directions": directions} | change
    return ssm_mixer(**arguments)


def test_wrong_inputs_are_named():
    one = cast(make_directions(6, 3, 2), torch.float32)[0]
    x = torch.ones(1, 2, 6)
    with pytest.raises(ValueError, match="xz must be"):
        call(xz=torch.ones(1, 2, 7))
    with pytest.raises(ValueError, match="x and z must be"):
        call(xz=x, z=torch.ones(1, 3, 6))
    with pytest.raises(ValueError, match="one dtype"):
        call(xz=x, z=x.double())
    with pytest.raises(ValueError, match="at least one Direction"):
        call(directions=[])
    with pytest.raises(ValueError, match=r"D has shape \(5,\), expected \(6,\)"):
        call(directions=[one._replace(D=torch.ones(5))])


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiled here, not interpreted")
def test_limits_of_the_fused_kernels_are_named():
    one, two = cast(make_directions(6, 3, 2), torch.float32)
    other = cast(make_directions(6, 4, 2), torch.float32)[0]
    many = cast(make_directions(6, 33, 2), torch.float32)
    with pytest.raises(ValueError, match="same N, R and K"):
        call(directions=[one, other], backend="triton")
    with pytest.raises(ValueError, match="up to 32 states, got 33"):
        call(directions=many, backend="triton")
    with pytest.raises(ValueError, match="one or two directions, got 3"):
        call(directions=[one, two, one], backend="triton")
