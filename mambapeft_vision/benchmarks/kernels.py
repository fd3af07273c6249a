"""Times every kernel of `mambapeft_kernels` on a CUDA GPU, beside the floor that the chip's units set.

    python scripts/bench_kernels.py [--out docs/kernels] [--case vim_s_b32 ...]

First the core checks of the kernels' tests run (float32 and bfloat16 against the float64 definition): no figure is
printed unless they pass. Every figure is the median over CUDA-graph replays, timed with CUDA events; a replay rotates
over input sets that together exceed the L2 cache. Writes OUT.csv and OUT.png.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from mambapeft_kernels import FUSED, add_rms_norm, available_backends, ssm_mixer
from matplotlib.figure import Figure
from torch import Tensor

from mambapeft_vision.benchmarks.kernel_cases import cast, errors, make_directions, make_xz, plain_mixer, results
from mambapeft_vision.benchmarks.measured import stamp, write_rows
from mambapeft_vision.engine.cuda_graph import capture
from mambapeft_vision.results.plots import png, save_png

REVERSE = (False, True)
Calls = Callable[["Case", str], Iterator[tuple[str, list[Callable[[], object]]]]]


@dataclass(frozen=True)
class Case:
    """One size: B samples of L tokens, E channels, N states, dt_rank R, model width D, in bfloat16."""

    name: str
    batch: int
    length: int = 197
    channels: int = 768
    states: int = 16
    rank: int = 24
    lora: int = 64

    @property
    def width(self) -> int:
        return self.channels // 2


CASES = [
    Case("vim_s_b32", 32),
    Case("vim_s_b256", 256),
    Case("vim_s_b32_n22", 32, states=22),
    Case("vim_s_b8_l730", 8, length=730),
    Case("vim_ti_b32", 32, channels=384, rank=12),
]


@dataclass(frozen=True)
class Chip:
    """Rates that the floors divide by: measured on one H200 (copy, product) and by its data sheet."""

    exponentials: float = 132 * 16 * 1.98e9  # /s, special-function units
    fp32: float = 132 * 128 * 2 * 1.98e9  # FLOP/s outside of the tensor cores
    product: float = 756e12  # FLOP/s, bfloat16
    memory: float = 4.12e12  # B/s


@dataclass(frozen=True)
class Work:
    """The unavoidable work of a kernel: each exponential and FLOP once, each input read and output written once."""

    exponentials: float = 0
    fp32: float = 0
    product: float = 0
    memory: float = 0

    def __add__(self, other: "Work") -> "Work":
        names = self.__dataclass_fields__
        return Work(**{k: getattr(self, k) + getattr(other, k) for k in names})

    def floor(self, chip: Chip) -> tuple[float, str]:
        """(µs, the unit that sets it): no version of the kernel runs faster."""
        times = {k: 1e6 * getattr(self, k) / getattr(chip, k) for k in self.__dataclass_fields__}
        unit = max(times, key=lambda name: times[name])
        return times[unit], unit


def work(case: Case) -> dict[str, Work]:
    """Kernel → its work; bytes count bfloat16 activations and checkpoints, float32 B|C and residual."""
    c, groups = case, len(REVERSE)
    tokens = c.batch * c.length
    plane = 2.0 * tokens * c.channels  # bytes of one [B, L, E]
    updates = float(groups * tokens * c.channels * c.states)
    bc = 4.0 * groups * tokens * 2 * c.states
    padded = (c.states + 7) // 8 * 8
    checkpoints = 2.0 * groups * c.batch * -(-c.length // 8) * c.channels * padded
    x_proj = 2.0 * groups * tokens * c.channels * (c.rank + 2 * c.states)
    dt_proj = 2.0 * groups * tokens * c.channels * c.rank
    rows = tokens * c.width
    gemm = 2.0 * tokens * c.width * 3 * c.channels  # in_proj and out_proj
    lora = 2.0 * tokens * c.lora * (c.width + c.channels)
    out = {
        "scan_forward": Work(updates, 6 * updates, 0, (2 * groups + 2) * plane + bc),
        "scan_forward_saving": Work(updates, 6 * updates, 0, (2 * groups + 3) * plane + bc + checkpoints),
        # recomputing the states: 6; adjoint 2, dB 2, dC 2, du 2, carry 1, dΔ 3
        "scan_backward": Work(updates, 18 * updates, 0, (4 * groups + 4) * plane + 2 * bc + checkpoints),
        "conv_forward": Work(0, 0, 0, (1 + groups) * plane),
        "conv_backward": Work(0, 0, 0, (2 + groups) * plane),
        "projections_forward": Work(0, 0, x_proj + dt_proj, 2 * groups * plane + bc),
        "dt_proj_backward": Work(0, 0, dt_proj, groups * plane + bc),
        "x_proj_backward": Work(0, 0, x_proj, 2 * groups * plane),
        "norm_forward": Work(memory=rows * (2 + 4 + 2 + 4)),
        "norm_backward": Work(memory=rows * (2 + 4 + 4 + 2 + 4)),
    }
    products = Work(product=2 * gemm + 3 * lora, memory=2 * (2 * 1.5 * plane + 2.0 * rows))
    out["_products"] = products
    return out


def block_floor(case: Case, chip: Chip) -> tuple[float, str]:
    """The sum of the floors of a block's parts, one after another."""
    parts = work(case)
    parts.pop("scan_forward")
    return sum(w.floor(chip)[0] for w in parts.values()), "sum of parts"


def graph_time(calls: list[Callable[[], object]], replays: int = 20) -> float:
    """Median µs of one call, over replays of a CUDA graph that runs all `calls` twice."""
    for call in calls:
        call()

    def twice() -> None:
        for call in calls * 2:
            call()

    graph = capture(twice, device=torch.device("cuda", torch.cuda.current_device()))
    return _median(graph.replay, replays) / (2 * len(calls))


def eager_time(calls: list[Callable[[], object]], repeats: int = 3) -> float:
    """Median µs of one call launched from Python: for the backends that are slow anyway."""
    calls[0]()
    return _median(calls[0], repeats)


def _median(run: Callable[[], object], repeats: int) -> float:
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def peak_memory(call: Callable[[], object]) -> float:
    """MiB above what was allocated before the call."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def input_sets(case: Case, count: int = 3) -> tuple[list, list[dict[str, Tensor]]]:
    """Weights (float32, as under autocast) and `count` independent sets of bfloat16 activations."""
    directions = cast(
        make_directions(case.channels, case.states, case.rank, offsets=False, device="cuda"), torch.float32, grad=False
    )
    sets = []
    for _ in range(count):
        xz = torch.randn(case.batch, case.length, 2 * case.channels, device="cuda").bfloat16()
        dout = torch.randn(case.batch, case.length, case.channels, device="cuda").bfloat16()
        sets.append({"xz": xz, "dout": dout, "dxz": torch.empty_like(xz)})
    return directions, sets


def parts(case: Case, backend: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Kernel → one call for each input set, of a fused backend."""
    from mambapeft_kernels.causal_conv1d import cuda_kernels as conv_cuda
    from mambapeft_kernels.causal_conv1d import triton_kernels as conv_triton
    from mambapeft_kernels.selective_scan import triton_kernels as scan_triton
    from mambapeft_kernels.ssm_mixer import projections

    on_cuda = backend == "cuda"
    scan: ModuleType = scan_triton
    if on_cuda:
        from mambapeft_kernels.selective_scan import cuda_kernels

        scan = cuda_kernels
    conv = conv_cuda if on_cuda else conv_triton
    directions, sets = input_sets(case)
    w = {f: [getattr(d, f) for d in directions] for f in directions[0]._fields[:-1]}
    taps, none = (w["conv_weight"], w["conv_bias"], REVERSE), [None, None]
    for s in sets:
        s["x"], s["z"] = s["xz"].chunk(2, -1)
        s["dx"], s["dz"] = s["dxz"].chunk(2, -1)
        s["u"] = conv_triton.conv_silu(s["x"], *taps)
        s["delta"], s["bc"] = projections.projections_forward(s["u"], w["x_proj"], w["dt_proj"], w["dt_bias"])

    def forward(s, save):
        ins = s["u"], s["delta"], s["bc"], s["z"]
        return scan.scan_forward(*ins, w["A_log"], w["D"], none, none, REVERSE, 0.5, save)

    for s in sets:
        _, s["total"], s["ckpt"] = forward(s, True)

    def backward(s, need_dA=False):
        ins = s["dout"], s["u"], s["delta"], s["bc"], s["z"], s["total"], s["ckpt"]
        return scan.scan_backward(*ins, w["A_log"], w["D"], none, REVERSE, 0.5, s["dz"], need_dA)

    for s in sets:
        s["du"], s["draw"], s["dbc"], _ = backward(s)
        s["dproj"] = projections.dt_proj_backward(s["draw"], w["dt_proj"], s["dbc"])

    def conv_back(s):
        return conv.conv_backward(s["du"], s["x"], *taps, s["dx"], False)

    def each(run):
        return [partial(run, s) for s in sets]

    yield "scan_forward", each(lambda s: forward(s, False))
    yield "scan_forward_saving", each(lambda s: forward(s, True))
    yield "scan_backward", each(backward)
    yield "scan_backward_with_dA", each(lambda s: backward(s, True))
    yield "conv_forward", each(lambda s: conv.conv_silu(s["x"], *taps))
    yield "conv_backward", each(conv_back)
    yield (
        "projections_forward",
        each(lambda s: projections.projections_forward(s["u"], w["x_proj"], w["dt_proj"], w["dt_bias"])),
    )
    yield "dt_proj_backward", each(lambda s: projections.dt_proj_backward(s["draw"], w["dt_proj"], s["dbc"]))
    yield (
        "x_proj_backward",
        each(lambda s: projections.x_proj_backward(s["du"], s["dproj"], s["x"], w["x_proj"], *taps, not on_cuda)),
    )


def norms(case: Case, backend: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """The residual norm, forward and backward (weight frozen), on three input sets."""
    shape = case.batch, case.length, case.width
    weight = torch.ones(case.width, device="cuda")
    runs = []
    for _ in range(3):
        hidden = torch.randn(shape, device="cuda").bfloat16().requires_grad_()
        residual = torch.randn(shape, device="cuda").requires_grad_()
        outs = add_rms_norm(hidden, residual, weight, backend=backend)
        runs.append((hidden, residual, outs, [torch.randn_like(o) for o in outs]))

    def forward(run):
        with torch.no_grad():
            return add_rms_norm(run[0], run[1], weight, backend=backend)

    def backward(run):
        _, _, (normed, out), (dnormed, dout) = run
        needs = (True, True, False)  # hidden, residual; not the weight
        return torch.ops.mambapeft.add_rms_norm_backward(
            dnormed, dout, out.detach(), weight, None, 1e-5, normed.dtype, *needs
        )

    yield "norm_forward", [partial(forward, r) for r in runs]
    yield "norm_backward", [partial(backward, r) for r in runs]


class _AddToFirstHalf(torch.autograd.Function):
    """out[..., :E] += delta in place, as a side branch on in_proj's X half does it."""

    @staticmethod
    def forward(ctx, out, delta):
        ctx.mark_dirty(out)
        out[..., : delta.shape[-1]] += delta
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, grad[..., : grad.shape[-1] // 2]


def mixers(case: Case, backend: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """The mixer core and the whole block with LoRA_p(X): forward + backward, and the block's evaluation."""
    directions, sets = input_sets(case)
    if backend == "plain":

        def mix(xz):
            x, z = xz.chunk(2, -1)
            return plain_mixer(x, z, directions)
    else:

        def mix(xz):
            return ssm_mixer(xz, directions, backend=backend)

    def core(s):
        return torch.autograd.grad(mix(s["xz"]), s["xz"], s["dout"])

    for s in sets:
        s["xz"].requires_grad_()
    yield "mixer_forward_backward", [partial(core, s) for s in sets]

    def draw(*shape):
        return torch.randn(*shape, device="cuda") / shape[-1] ** 0.5

    into, back = draw(2 * case.channels, case.width).bfloat16(), draw(case.width, case.channels).bfloat16()
    down, up = draw(case.lora, case.width).requires_grad_(), draw(case.channels, case.lora).requires_grad_()
    weight = torch.ones(case.width, device="cuda")
    norm_backend = "naive" if backend == "plain" else backend
    blocks = []
    for _ in range(2):
        shape = case.batch, case.length, case.width
        hidden = torch.randn(shape, device="cuda").bfloat16().requires_grad_()
        residual = torch.randn(shape, device="cuda").requires_grad_()
        blocks.append((hidden, residual, torch.randn_like(hidden), torch.randn_like(residual)))

    def block(hidden, residual):
        normed, residual = add_rms_norm(hidden, residual, weight, backend=norm_backend)
        branch = F.linear(F.linear(normed, down.bfloat16()), up.bfloat16())
        xz = _AddToFirstHalf.apply(F.linear(normed, into), branch)
        return F.linear(mix(xz), back), residual

    def step(hidden, residual, dhidden, dresidual):
        leaves = [hidden, residual, down, up]
        return torch.autograd.grad(block(hidden, residual), leaves, [dhidden, dresidual])

    def evaluate(hidden, residual, *_):
        with torch.no_grad():
            return block(hidden, residual)

    yield "block_forward_backward", [partial(step, *b) for b in blocks]
    yield "block_evaluation", [partial(evaluate, *b) for b in blocks]


def check(backends: list[str]) -> None:
    """The core of tests/kernels; raises SystemExit naming what failed."""
    for channels, states, rank, length in ((192, 16, 12, 65), (100, 22, 4, 19)):
        directions = make_directions(channels, states, rank, device="cuda")
        xz = make_xz(2, length, channels, "cuda").bfloat16().double()
        reference = results(xz, directions, torch.float64, "naive")
        plain = errors(results(xz, directions, torch.bfloat16, "plain", torch.float32), reference)
        for backend in backends:
            exact = errors(results(xz, directions, torch.float32, backend), reference)
            half = errors(results(xz, directions, torch.bfloat16, backend, torch.float32), reference)
            bad = {k: v for k, v in exact.items() if not v <= 1e-5}
            bad |= {f"bfloat16 {k}": v for k, v in half.items() if not v <= 2 * plain[k]}
            if bad:
                raise SystemExit(f"no figures: {backend} fails its checks: {bad}")
            print(f"checked {backend:7s} E={channels} N={states}: float32 {max(exact.values()):.1e}", flush=True)


def measure(case: Case, chip: Chip) -> Iterator[dict[str, Any]]:
    """Rows of the table for one case."""
    floors = {k: w.floor(chip) for k, w in work(case).items()}
    floors["scan_backward_with_dA"] = floors["scan_backward"]
    floors["block_forward_backward"] = block_floor(case, chip)
    fused = [b for b in FUSED if b in available_backends("cuda")]
    slow = [] if case.batch > 64 else ["torch", "plain"]
    slow += ["mamba_ssm"] if "mamba_ssm" in available_backends("cuda") else []
    jobs: list[tuple[str, Calls, Callable[[list[Callable[[], object]]], float]]] = []
    jobs += [(b, f, graph_time) for b in fused for f in (parts, norms, mixers)]
    jobs += [(b, mixers, eager_time) for b in slow]
    for backend, build, timer in jobs:
        if build is norms and backend != fused[0]:
            continue  # both fused backends share the norm
        for kernel, calls in build(case, backend):
            peak = peak_memory(calls[0])
            time = timer(calls)
            floor, unit = floors.get(kernel, (float("nan"), ""))
            yield {
                "case": case.name,
                "kernel": kernel,
                "backend": backend,
                "us": round(time, 1),
                "floor_us": round(floor, 1),
                "bound": unit,
                "fraction_of_floor": round(floor / time, 2),
                "peak_MiB": round(peak, 1),
            }
        torch.cuda.empty_cache()


def plot(rows: list[dict[str, Any]], case: str, path: Path) -> None:
    """Times of one case as bars (log scale), with a tick at each floor."""
    rows = [r for r in rows if r["case"] == case]
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    figure = Figure(figsize=(9, 0.5 * len(kernels) + 1.5), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(backends)
    for i, backend in enumerate(backends):
        mine = [r for r in rows if r["backend"] == backend]
        at = [kernels.index(r["kernel"]) + (i - (len(backends) - 1) / 2) * height for r in mine]
        bars = axis.barh(at, [r["us"] for r in mine], height, label=backend)
        axis.bar_label(bars, [f"{r['us']:.0f}" for r in mine], fontsize=7, padding=2)
    for r in rows:
        if r["floor_us"] == r["floor_us"]:
            axis.vlines(r["floor_us"], kernels.index(r["kernel"]) - 0.45, kernels.index(r["kernel"]) + 0.45, "k")
    axis.set(yticks=range(len(kernels)), yticklabels=kernels, xscale="log", xlabel="µs (black line: floor)", title=case)
    axis.set_xlim(right=2 * max(r["us"] for r in rows))  # room for the longest bar's label
    axis.invert_yaxis()
    axis.legend()
    save_png(png(figure, dpi=110), path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs") / "kernels", help="path without suffix")
    parser.add_argument("--case", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py: got no CUDA GPU, expected one; run it on a machine with an NVIDIA GPU")
    check([b for b in FUSED if b in available_backends("cuda")])

    print(stamp())
    rows = []
    for case in (c for c in CASES if c.name in args.case):
        for row in measure(case, Chip()):
            rows.append(row)
            print(
                f"{row['case']:14s} {row['kernel']:24s} {row['backend']:9s} {row['us']:10.1f} us  floor "
                f"{row['floor_us']:7.1f} ({row['bound']}) {row['fraction_of_floor']:5.2f}  {row['peak_MiB']:8.1f} MiB",
                flush=True,
            )
    write_rows(args.out.with_suffix(".csv"), rows)
    plot(rows, rows[0]["case"], args.out.with_suffix(".png"))
