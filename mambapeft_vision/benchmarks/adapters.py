"""Many adapters on one backbone: memory of each, time of a switch, and images per second of mixed requests.

    python scripts/bench_adapters.py --backbone vim_small_patch16_224 --adapters 100 --device cuda

Random weights and adapters of one preset. A forward pass of one batch is timed with the same adapter again and again,
and with another adapter every time: the difference is the switch. Mixed requests are batches in which every image names
a random adapter, computed adapter by adapter. Medians after a warm-up.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.adapter.pool import AdapterPool
from mambapeft_vision.adapter.presets import read_preset
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.benchmarks.measured import stamp
from mambapeft_vision.utils.paths import configs_folder

MIB = 2**20


def pool_of(backbone: str, preset: str, adapters: int, device: str) -> tuple[AdapterPool, float]:
    """A pool with that many adapters of a preset, and the seconds that one took to load."""
    base = create_backbone(backbone, "random")
    specs = read_preset(configs_folder() / "method" / f"{preset}.yaml").methods_on(backbone)
    model = adapt(
        create_backbone(backbone, "random"), {n: build_method(n, s, preset) for n, s in specs.items()}, num_classes=100
    )
    pool = AdapterPool(base.to(device))
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for number in range(adapters):
            with torch.no_grad():
                for tensor in model.trained().values():
                    tensor.normal_(std=0.02)
            model.save(Path(folder), {"task": "random"})
            started = time.perf_counter()
            pool.add(str(number), folder)
            seconds.append(time.perf_counter() - started)
    return pool, statistics.median(seconds)


def milliseconds(call: Callable[[int], object], device: str, repeats: int) -> float:
    """Median of one call; `call` gets the number of the repetition."""
    times = []
    for number in range(repeats + 3):
        started = time.perf_counter()
        call(number)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def measure(backbone: str, preset: str, adapters: int, batch: int, device: str, repeats: int) -> dict[str, str]:
    """Measures one preset. Returns the figures that the command prints, by name."""
    pool, load = pool_of(backbone, preset, adapters, device)
    height, width = pool.backbone.pretrained_cfg["input_size"][1:]
    images = torch.randn(batch, 3, height, width, device=device)
    draw = random.Random(0)
    mixed = [[draw.choice(pool.names) for _ in range(batch)] for _ in range(repeats + 3)]
    same = milliseconds(lambda _: pool(images, ["0"] * batch), device, repeats)
    other = milliseconds(lambda number: pool(images, [pool.names[number % adapters]] * batch), device, repeats)
    of_all = milliseconds(lambda number: pool(images, mixed[number]), device, repeats)
    one = pool.bytes_of("0") / MIB
    facts = {
        "backbone": f"{backbone}, {pool.backbone_bytes / MIB:.1f} MiB",
        "adapters": f"{adapters} of {preset}, {one:.2f} MiB each, {adapters * one:.1f} MiB together",
        "load an adapter": f"{1000 * load:.0f} ms",
        f"a batch of {batch}, one adapter": f"{same:.2f} ms ({1000 * batch / same:,.0f} images/s)",
        "the same, another adapter each time": f"{other:.2f} ms, so a switch takes {other - same:+.2f} ms",
        f"a batch of {batch}, every image its own": f"{of_all:.2f} ms ({1000 * batch / of_all:,.0f} images/s)",
    }
    if device != "cpu":
        facts["peak memory"] = f"{torch.cuda.max_memory_allocated() / MIB:,.0f} MiB"
    return {**facts, "measured": stamp(device)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vim_nano_patch8_64", help="registered name (default: %(default)s)")
    parser.add_argument("--preset", default="lora_p_x")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    facts = measure(**vars(options))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
