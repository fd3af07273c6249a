"""Compilation ahead of the first step: what it launches runs, and is what a model launches."""

import importlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mambapeft_kernels.compile_ahead import (
    BlockSizes,
    StageSizes,
    compile_ahead,
    compile_stages_ahead,
    create_launchers_one_at_a_time,
    one_at_a_time,
    stage_tasks,
    tasks,
)

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones.contract import frozen_casts
from mambapeft_vision.backbones.vim import Vim
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.engine import module as training_module
from mambapeft_vision.methods.lora import LoRA

SIZES = BlockSizes(width=24, channels=48, states=5, rank=3, taps=4)


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_task_runs(device, dtype):
    device = torch.device("cpu" if device == "interpreter" else device)
    every = tasks(SIZES, 0.5, dtype, device, "triton")
    assert len(every) == 11
    for task in every:
        task()


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_task_of_vmamba_runs(device):
    device = torch.device("cpu" if device == "interpreter" else device)
    stages = (StageSizes(2, 3, 4, 6, 1, 2), StageSizes(1, 2, 6, 8, 1, 2))[: 1 if device.type == "cpu" else 2]
    every = stage_tasks(stages, torch.float32, device, "triton" if device.type == "cpu" else "cuda")
    assert len(every) == 5 * len(stages) + 2
    for task in every:
        task()


def test_where_nothing_compiles_nothing_is_started():
    assert compile_ahead(SIZES, 0.5, torch.float32, torch.device("cpu"), "triton") == ()
    assert compile_ahead(SIZES, 0.5, torch.float32, torch.device("cuda", 0), "torch") == ()
    assert compile_stages_ahead((), torch.float32, torch.device("cpu"), "triton") == ()


def in_threads(work, threads: int = 8) -> list:
    """What `work(i)` returns in each of that many threads, which take turns as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as executor:
            return list(executor.map(work, range(threads)))
    finally:
        sys.setswitchinterval(interval)


def test_threads_that_create_launchers_take_turns():
    inside = []

    def create(kernel: int) -> bool:
        inside.append(kernel)
        time.sleep(0.002)
        return inside.pop() == kernel and not inside

    create = one_at_a_time(create)
    assert all(in_threads(lambda thread: all(create(thread) for _ in range(5))))


@pytest.mark.gpu
def test_threads_get_the_launchers_of_their_kernels():
    """At once after `create_launchers_one_at_a_time`; without it Triton 3.6 mixes them up."""
    import triton

    gelu_kernels = importlib.import_module("mambapeft_kernels.gelu.triton_kernels")
    for task in tasks(SIZES, 0.5, torch.bfloat16, torch.device("cuda"), "triton"):
        task()
    create_launchers_one_at_a_time()
    modules = [importlib.import_module(f"mambapeft_kernels.{op}.triton_kernels") for op in ("rms_norm", "low_rank")]
    kernels = [kernel for module in [*modules, gelu_kernels] for kernel in compiled_kernels(module)]
    driver = triton.runtime.driver.active
    expected = [driver.launcher_cls(kernel.src, kernel.metadata).launch for kernel in kernels]

    def wrong(first: int) -> int:
        order = [(first + k) % len(kernels) for k in range(300)]
        found = (driver.launcher_cls(kernels[k].src, kernels[k].metadata).launch for k in order)
        return sum(launch is not expected[k] for launch, k in zip(found, order))

    assert len(kernels) > 4 and not any(in_threads(wrong))


def compiled_kernels(module) -> list:
    """The variants of a module's Triton kernels that this process has launched."""
    caches = (k.device_caches.values() for k in vars(module).values() if hasattr(k, "device_caches"))
    return [kernel for cache in caches for device in cache for kernel in device[0].values()]


class Noted:
    """Stands for a Triton kernel: notes the variant that a launch would compile, and computes nothing."""

    def __init__(self, kernel, variants: set):
        self._kernel, self._variants = kernel, variants
        self._unspecialised = kernel.rewriter.kwargs.get("do_not_specialize") or ()

    def __getitem__(self, grid):
        return self._note

    def _note(self, *arguments, **constants):
        named = zip(self._kernel.arg_names, arguments)
        kinds = tuple(self._kind(value, name in self._unspecialised) for name, value in named)
        self._variants.add((self._kernel.fn.__module__, self._kernel.__name__, kinds, tuple(sorted(constants.items()))))

    def _kind(self, value, unspecialised: bool):
        """Triton's rules: whether a pointer is aligned, a number one or divisible by 16."""
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return type(value) if unspecialised or type(value) is not int else (value == 1, value % 16 == 0)


@pytest.fixture
def variants(monkeypatch) -> set:
    """What launches of the `cuda` backend would compile, on a CPU."""
    nvrtc = pytest.importorskip("mambapeft_kernels.nvrtc", reason="NOT RUN: cuda-core is not installed")
    noted = set()
    for name in (
        "ssm_mixer.projections",
        "rms_norm.triton_kernels",
        "low_rank.triton_kernels",
        "pixel_lookup.triton_kernels",
    ):
        module = importlib.import_module(f"mambapeft_kernels.{name}")
        kernels = {k: v for k, v in vars(module).items() if type(v).__name__ == "InterpretedFunction"}
        for attribute, kernel in kernels.items():
            monkeypatch.setattr(module, attribute, Noted(kernel, noted))
    monkeypatch.setattr(nvrtc, "run", lambda files, name, macros, *_: noted.add((name, *macros.items())))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    chosen = {"pixel_lookup": "resolve_backend", "low_rank": "resolve_for"}
    for name in ("rms_norm", "low_rank", "pixel_lookup", "ssm_mixer"):
        api = importlib.import_module(f"mambapeft_kernels.{name}.api")
        monkeypatch.setattr(api, chosen.get(name, "backend_for"), lambda *_: "cuda")
    monkeypatch.setattr(training_module, "resolve_backend", lambda *_: "cuda")
    return noted


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/engine asks the same of a whole run")
@pytest.mark.parametrize("rank", [4, 16, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_interpreter_what_a_model_launches_is_compiled_ahead(dtype, rank, variants):
    model = Vim(32, patch_size=8, embed_dim=32, depth=3, num_classes=0)
    sizes = BlockSizes(width=32, channels=64, states=16, rank=2, taps=4)
    for task in tasks(sizes, 0.5, dtype, torch.device("cpu"), "cuda"):
        task()
    compiled = set(variants)
    variants.clear()

    method = LoRA(targets="in_proj", rows="x", rank=rank, scale=0.5, dropout=0.1)
    adapted = adapt(model, {"m": method}, 3)
    for mixer in model.mixers:
        mixer.kernel = "cuda"
    normalise = training_module.Normalise(Preprocessing((32, 32), "bicubic", (0.5,) * 3, (0.5,) * 3))
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    half = dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=half), frozen_casts(adapted, dtype if half else None):
        for batch in (images, images[:4]):  # an epoch's last batch is smaller; of a multiple of 4
            adapted.train()(normalise(batch)).sum().backward()
            with torch.no_grad():
                adapted.eval()(normalise(batch))
    assert len(variants) >= 15 and variants - compiled == set()
