"""Images per second and memory of a whole model on one GPU: training steps, and evaluation of the merged model.

    python scripts/bench_model.py --backbone vim_s --batch 32 256 --kernel cuda triton

Random images and weights, LoRA_p(X) of rank 64, bfloat16 autocast with float32 parameters. A training step is forward,
cross entropy, backward, clipping and fused AdamW, launched one kernel after the other (no CUDA graph). Evaluation is
measured launched the same way, and replayed as a CUDA graph. Each figure is the mean of 10 steps (20 replays) after 3.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.benchmarks.measured import stamp
from mambapeft_vision.engine.cuda_graph import capture
from mambapeft_vision.methods.lora import LoRA

NAMES = {"vim_ti": "vim_tiny_patch16_224", "vim_s": "vim_small_patch16_224", "vim_b": "vim_base_patch16_224"}
CLASSES = 100


def build(backbone: str, kernel: str) -> AdaptedModel:
    """A backbone with random weights and LoRA_p(X), on the GPU."""
    method = LoRA(targets="layers.*.mixer.in_proj.weight", rows="x", rank=64, dropout=0.1)
    model = adapt(create_backbone(NAMES[backbone], "random"), {"lora_p_x": method}, CLASSES).cuda()
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
def evaluation(model: AdaptedModel, images: torch.Tensor) -> tuple[float, float]:
    """Seconds a batch, launched and replayed; merges the model."""
    model.eval()
    model.merge()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        launched = seconds_per_call(lambda: model(images), 10)
        graph = capture(lambda: model(images), device=images.device)
    return launched, seconds_per_call(graph.replay, 20)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=NAMES, default="vim_s")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--kernel", nargs="+", default=["cuda", "triton"])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "error: this benchmark needs a CUDA GPU, and there is none here\n")
    print(stamp())
    print("| backbone | kernel | batch | training img/s | evaluation img/s | as a graph | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for batch in options.batch:
        images = torch.randn(batch, 3, 224, 224, device="cuda")
        labels = torch.arange(batch, device="cuda") % CLASSES
        for kernel in options.kernel:
            torch.cuda.reset_peak_memory_stats()
            model = build(options.backbone, kernel)
            step = training(model, images, labels)
            peak = torch.cuda.max_memory_allocated() / 2**30
            launched, replayed = evaluation(model, images)
            rates = " | ".join(f"{batch / seconds:,.0f}" for seconds in (step, launched, replayed))
            print(f"| {options.backbone} | {kernel} | {batch} | {rates} | {peak:.1f} |")
