"""Times VMamba's ops on a CUDA GPU, stage by stage, beside the floor that the chip's units set.

    python scripts/bench_ss2d.py [--model s] [--batch 32 256] [--stage 1 2 3 4] [--out docs/ss2d.csv]

First `ss2d` is checked against its float64 definition: no figure is printed unless it passes. Every figure is the
median over CUDA-graph replays in bfloat16. A replay rotates over three input sets, or one where sets are large. They
exceed the L2 cache at every stage and batch size, but for the last stage at batch 32.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from mambapeft_kernels import add_layer_norm, depthwise_conv_silu, layer_norm, resolve_backend
from mambapeft_kernels.ss2d.fused import padded
from torch import Tensor

from mambapeft_vision.benchmarks.kernel_cases import errors
from mambapeft_vision.benchmarks.kernels import Chip, Work, graph_time, peak_memory
from mambapeft_vision.benchmarks.measured import write_rows
from mambapeft_vision.benchmarks.ss2d_cases import cast, make_map, make_weights, results

WIDTHS = {"t": (96, 1), "s": (96, 2), "b": (128, 2)}  # D of the first stage, E / D


@dataclass(frozen=True)
class Case:
    """One stage of a VMamba: B maps of side x side places, width D, E channels, dt_rank R, N states."""

    model: str
    stage: int
    batch: int
    states: int = 1

    @property
    def side(self) -> int:
        return 56 >> (self.stage - 1)

    @property
    def width(self) -> int:
        return WIDTHS[self.model][0] << (self.stage - 1)

    @property
    def channels(self) -> int:
        return self.width * WIDTHS[self.model][1]

    @property
    def rank(self) -> int:
        return -(-self.width // 16)

    @property
    def name(self) -> str:
        return f"{self.model}{self.stage}_b{self.batch}"


def work(case: Case) -> dict[str, Work]:
    """Op → its unavoidable work: bytes in bfloat16, each tensor once; special functions and products once."""
    places = case.batch * case.side**2
    e, d = float(places * case.channels), float(places * case.width)
    proj = float(places * 4 * (case.rank + 2 * case.states))
    scans = 4 * e * (2 + case.states)  # softplus 2, one decay a state
    product = 2.0 * proj * case.channels + 2.0 * 4 * e * case.rank
    return {
        "ss2d_forward": Work(scans, 0, product, 2 * (2 * e + proj)),
        "ss2d_backward": Work(scans + 4 * e, 0, 2 * product, 2 * (3 * e + 2 * proj)),
        "conv_forward": Work(2 * e, 0, 0, 2 * 2 * e),
        "conv_backward": Work(2 * e, 0, 0, 2 * 3 * e),
        "out_norm_forward": Work(memory=4 * e),
        "out_norm_backward": Work(memory=6 * e),
        "add_norm_forward": Work(memory=12 * d),
        "add_norm_backward": Work(memory=14 * d),
    }


def ops(case: Case) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Op → one call for each input set; weights are frozen and float32, as under autocast.

    A backward is called by its op: autograd would run it on the stream of the forward, outside of a graph.
    """
    for op in ("depthwise_conv2d", "layer_norm"):
        importlib.import_module(f"mambapeft_kernels.{op}.triton_kernels")  # registers the backward ops
    weights = cast(make_weights(case.channels, case.states, case.rank, False, device="cuda"), torch.float32, False)
    wide = case.batch, case.side, case.side, case.channels
    narrow = *wide[:3], case.width
    count = 1 if 2 * case.batch * case.side**2 * case.channels > 200 << 20 else 3
    kernels, backend = torch.ops.mambapeft, resolve_backend("auto", "cuda")

    def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(count)]

    us, douts = draw(wide), draw(wide)
    weights = padded(us[0], weights, backend)
    kept = [kernels.ss2d(u, *weights, backend, True)[1:] for u in us]
    only_u = [True] + [False] * len(weights)
    yield "ss2d_forward", [partial(kernels.ss2d, u, *weights, backend, False) for u in us]
    yield "ss2d_forward_saving", [partial(kernels.ss2d, u, *weights, backend, True) for u in us]
    yield (
        "ss2d_backward",
        [partial(kernels.ss2d_backward, g, u, *weights, *k, backend, only_u) for g, u, k in zip(douts, us, kept)],
    )
    del kept
    filters = torch.randn(case.channels, 1, 3, 3, device="cuda") / 3
    yield "conv_forward", [partial(depthwise_conv_silu, x, filters) for x in us]
    backward = kernels.depthwise_conv_silu_backward
    yield "conv_backward", [partial(backward, g, x, filters, None, backend, True, False) for g, x in zip(douts, us)]
    backward, scale = kernels.add_layer_norm_backward, torch.ones(case.channels, device="cuda")
    tail = scale, None, 1e-5, torch.bfloat16
    yield "out_norm_forward", [partial(layer_norm, x, scale, scale) for x in us]
    only_hidden = [True, False, False, False]
    yield "out_norm_backward", [partial(backward, g, None, x, *tail, only_hidden) for g, x in zip(douts, us)]
    del us, douts
    scale = torch.ones(case.width, device="cuda")
    tail = scale, None, 1e-5, torch.bfloat16
    hidden, residual, dnormed = draw(narrow), draw(narrow, torch.float32), draw(narrow)
    yield "add_norm_forward", [partial(add_layer_norm, h, r, scale, scale) for h, r in zip(hidden, residual)]
    both = [True, True, False, False]
    # Of a frozen norm the sum is kept in bfloat16: any map stands for it.
    yield "add_norm_backward", [partial(backward, g, r, h, *tail, both) for g, r, h in zip(dnormed, residual, hidden)]


def check() -> None:
    """The core of tests/kernels/test_ss2d.py; raises SystemExit naming what failed."""
    for channels, states, rank, height, width in ((192, 1, 6, 14, 13), (100, 2, 4, 7, 9)):
        weights = make_weights(channels, states, rank, device="cuda")
        u = make_map(2, height, width, channels, "cuda").bfloat16().double()
        reference = results(u, weights, torch.float64, "naive")
        plain = errors(results(u, weights, torch.bfloat16, "plain", torch.float32), reference)
        exact = errors(results(u, weights, torch.float32, "auto"), reference)
        half = errors(results(u, weights, torch.bfloat16, "auto", torch.float32), reference)
        bad = {k: v for k, v in exact.items() if not v <= 1e-5}
        bad |= {f"bfloat16 {k}": v for k, v in half.items() if not v <= 2 * plain[k]}
        if bad:
            raise SystemExit(f"no figures: ss2d fails its checks: {bad}")
        print(f"checked ss2d E={channels} N={states}: float32 {max(exact.values()):.1e}", flush=True)


def measure(case: Case, chip: Chip) -> Iterator[dict]:
    """Rows of the table for one stage."""
    floors = {name: w.floor(chip) for name, w in work(case).items()}
    floors["ss2d_forward_saving"] = floors["ss2d_forward"]
    for name, calls in ops(case):
        floor, unit = floors[name]
        peak = peak_memory(calls[0])
        time = graph_time(calls)
        yield {
            "case": case.name,
            "op": name,
            "us": round(time, 1),
            "floor_us": round(floor, 1),
            "bound": unit,
            "fraction_of_floor": round(floor / time, 2),
            "peak_MiB": round(peak, 1),
        }
    torch.cuda.empty_cache()


def main() -> None:
    """Checks, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WIDTHS, default="s")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--stage", type=int, nargs="+", choices=[1, 2, 3, 4], default=[1, 2, 3, 4])
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_ss2d.py: got no CUDA GPU, expected one; run it on a machine with an NVIDIA GPU")
    check()
    rows = []
    for case in (Case(args.model, stage, batch) for batch in args.batch for stage in args.stage):
        for row in measure(case, Chip()):
            rows.append(row)
            print(
                f"{row['case']:8s} {row['op']:20s} {row['us']:9.1f} us  floor {row['floor_us']:7.1f} "
                f"({row['bound']}) {row['fraction_of_floor']:5.2f}  {row['peak_MiB']:8.1f} MiB",
                flush=True,
            )
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
