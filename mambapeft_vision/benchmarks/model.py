"""Images per second and memory of a whole model on one GPU: training steps, and evaluation of the merged model.

    python scripts/bench_model.py --backbone vim_s --batch 32 256 --kernel cuda triton
    python scripts/bench_model.py --backbone vmamba_s --method lora_in_proj --batch 256 --kernel cuda

Random images and weights, one preset, bfloat16 autocast with float32 parameters. A training step is forward, cross
entropy, backward, clipping and fused AdamW, launched one kernel after the other (no CUDA graph). Evaluation is measured
launched the same way, and replayed as a CUDA graph; there each batch is copied from the host, as uint8, and normalised.
Each figure is the mean of 10 steps (40 replays) after 3.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import frozen_casts
from mambapeft_vision.benchmarks.measured import stamp
from mambapeft_vision.benchmarks.training import CLASSES, plan_of_method
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.engine.cuda_graph import capture
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.run.build import build_backbone, build_model


def build(backbone: str, preset: str, kernel: str) -> AdaptedModel:
    """A backbone of configs/backbone with random weights and a preset, on the GPU."""
    plan = plan_of_method(preset, [f"backbone={backbone}"])
    model = build_model(plan, build_backbone(plan), CLASSES).cuda()
    model.backbone.set_kernel(kernel, "cuda")
    return model


def seconds_per_call(call: Callable[[], object], repeats: int) -> float:
    """Mean seconds of a call over `repeats`, after a warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def training(model: AdaptedModel, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Seconds of a training step, launched kernel by kernel."""
    model.train()
    optimizer = torch.optim.AdamW(model.param_groups(1e-3, 1e-4), fused=True)
    trained = list(model.trained().values())

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return seconds_per_call(step, 10)


@torch.no_grad()
def evaluation(model: AdaptedModel, batch: int) -> tuple[float, float]:
    """Seconds a batch, launched and replayed; merges the model."""
    model.eval()
    model.merge()
    normalise = Normalise(Preprocessing.from_timm(model.backbone.default_cfg)).cuda()
    host = torch.randint(0, 255, (batch, *model.backbone.default_cfg["input_size"]), dtype=torch.uint8).pin_memory()
    images = host.cuda()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False), frozen_casts(model, torch.bfloat16):
        launched = seconds_per_call(lambda: model(normalise(images)), 10)
        graph = capture(lambda: model(normalise(images)), device=images.device)

        def replay() -> None:
            images.copy_(host, non_blocking=True)
            graph.replay()

        return launched, seconds_per_call(replay, 40)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vim_s", help="a config of configs/backbone")
    parser.add_argument("--method", default="lora_p_x", help="a preset of configs/method")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--kernel", nargs="+", default=["cuda", "triton"])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "error: this benchmark needs a CUDA GPU, and there is none here\n")
    print(stamp())
    print("| backbone | method | kernel | batch | training img/s | evaluation img/s | as a graph | peak GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in options.batch:
        labels = torch.arange(batch, device="cuda") % CLASSES
        for kernel in options.kernel:
            torch.cuda.reset_peak_memory_stats()
            model = build(options.backbone, options.method, kernel)
            images = torch.randn(batch, *model.backbone.default_cfg["input_size"], device="cuda")
            step = training(model, images, labels)
            peak = torch.cuda.max_memory_allocated() / 2**30
            launched, replayed = evaluation(model, batch)
            rates = " | ".join(f"{batch / seconds:,.0f}" for seconds in (step, launched, replayed))
            print(f"| {options.backbone} | {options.method} | {kernel} | {batch} | {rates} | {peak:.1f} |")
