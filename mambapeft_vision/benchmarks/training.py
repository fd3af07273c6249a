"""Training speed on one GPU, through `python train.py`'s own path: images/s, GPU busy share, peak memory.

    python scripts/bench_train.py                                    # LoRA_p(X), batch 32 and 256, bf16
    python scripts/bench_train.py --methods all --batch 32 --busy    # every preset that fits the backbone
    python scripts/bench_train.py --backbone vim_s mambareg_s        # several backbones, side by side
    python scripts/bench_train.py --guard                            # is a commit slower than the record in git?
    python scripts/bench_train.py --profile lora_p_x                 # where the step's time goes
    python scripts/bench_train.py --whole-task                       # a VTAB-sized task as a process; two in a sweep
    python scripts/bench_train.py --reference MambaPEFT              # and a checkout of the published code, if it runs

The images are JPEG files of random content in VTAB's folder layout, 1,000 to train on, made by this script; weights are
random. A run trains a few epochs; its speed is the median over the epochs after the second. In the first two, kernels
are launched one by one and the step is captured. Busy share: the kernels' time, by the profiler, over a step's time.
"""

import argparse
import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image

from mambapeft_vision.adapter.presets import fitting_presets
from mambapeft_vision.benchmarks import guard
from mambapeft_vision.benchmarks.measured import stamp, write_rows
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.engine.loop import step_settings
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.engine.precision import apply_precision
from mambapeft_vision.engine.schedule import make_optimizer
from mambapeft_vision.engine.step import TrainStep
from mambapeft_vision.results.layout import RESULT_FILE
from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.results.plots import png, save_png
from mambapeft_vision.results.tables.render import Table, to_markdown
from mambapeft_vision.run.build import build_backbone, build_model, set_kernel
from mambapeft_vision.run.compose import compose
from mambapeft_vision.run.run import train
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.sweep.worker_cache import Kept
from mambapeft_vision.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GUARD_FILE = ROOT / "docs" / "guard.csv"
CLASSES, TRAIN_IMAGES = 100, 1000
EPOCHS = {32: 6, 256: 8}  # a step and a half a second at least; the last three are counted


# Data


def write_image(path: Path, seed: int, size: int = 224) -> None:
    """A JPEG of random blobs, which takes about the bytes of a photograph."""
    random = np.random.RandomState(seed)
    small = Image.fromarray(random.randint(0, 255, (size // 8, size // 8, 3), dtype=np.uint8))
    small.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def make_task(folder: Path, test_images: int) -> Path:
    counts = {"train800val200": TRAIN_IMAGES, "test": test_images}
    paths = {split: [f"images/{split}/{i:06d}.jpg" for i in range(count)] for split, count in counts.items()}
    for split, names in paths.items():
        (folder / "images" / split).mkdir(parents=True)
        (folder / f"{split}.txt").write_text("".join(f"{name} {i % CLASSES}\n" for i, name in enumerate(names)))
    files = [folder / name for names in paths.values() for name in names]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_image, files, range(len(files)), chunksize=64))
    return folder


def overrides(task: Path, outputs: Path, method: str, *more: str) -> list[str]:
    return [
        f"method=[{method}]",
        "dataset=folder",
        f"dataset.name=bench/{task.name}",
        f"dataset.folder={task}",
        f"dataset.num_classes={CLASSES}",
        f"paths.outputs={outputs}",
        f"paths.cache={outputs}/cache",
        "backbone.weights=random",
        *more,
    ]


def plan_of(arguments: list[str]) -> tuple[DictConfig, RunPlan]:
    cfg = compose("train", arguments, configs=ROOT / "configs")
    return cfg, make_plan(cfg)


def plan_of_method(method: str, more: list[str]) -> RunPlan:
    """For steps by themselves, which need no task."""
    return plan_of([f"method=[{method}]", "backbone.weights=random", *more])[1]


# Runs


def measure(
    task: Path, outputs: Path, backbone: str, method: str, batch: int, precision: str, kept: Kept, more: list[str]
) -> dict[str, Any]:
    """One short run through `train`. Returns the figures in its files."""
    chosen = [f"backbone={backbone}", f"dataset.batch_size={batch}", f"trainer.precision={precision}", *more]
    _, plan = plan_of(overrides(task, outputs, method, *chosen))
    measured = EPOCHS.get(batch, 8)
    # Methods that first choose what to train are measured after that.
    before = max(spec.get("warmup_steps", 0) for spec in plan.config["method"].values())
    epochs = measured + math.ceil(before / math.ceil(TRAIN_IMAGES / batch))
    chosen += [f"trainer.max_epochs={epochs}", "trainer.warmup_epochs=1"]
    cfg, plan = plan_of(overrides(task, outputs, method, *chosen))
    record = train(cfg, sources=kept.sources)
    assert record is not None  # only a dry run has none
    rates = [row["images_per_second"] for row in read_metrics(plan.folder)][2 - measured :]
    return {
        "backbone": backbone,
        "method": method,
        "batch": batch,
        "precision": precision,
        "train_images_per_s": round(median(rates)),
        "peak_gib": round(record.peak_memory_bytes / 2**30, 2),
        "trainable": record.trainable,
        "test_images_per_s": round(record.test_images_per_second),
    }


def presets(backbone: str) -> list[str]:
    """Methods that attach to the backbone, in the order of their files."""
    _, plan = plan_of([f"backbone={backbone}", "backbone.weights=random"])
    fitting, reasons = fitting_presets(ROOT / "configs" / "method", plan.config["backbone"]["name"])
    for name, reason in reasons.items():
        print(f"{name} is left out: {reason}", flush=True)
    return fitting


# One step by itself


@dataclass
class Prepared:
    """A training step on a stream of its own, with a batch of random images that is on the device."""

    step: TrainStep
    images: torch.Tensor
    labels: torch.Tensor
    stream: torch.cuda.Stream

    def __call__(self, seed: int) -> None:
        with torch.cuda.stream(self.stream):
            self.step(self.images, self.labels, seed)


def prepare(plan: RunPlan, batch: int, precision: str) -> Prepared:
    """Prepares steps that are captured by the time this returns."""
    device = torch.device("cuda", 0)
    apply_precision(precision)
    backbone = build_backbone(plan)
    set_kernel(backbone, plan.config["kernel"], device)
    model = build_model(plan, backbone, CLASSES).to(device).train()
    normalise = Normalise(Preprocessing.from_timm(backbone.default_cfg)).to(device)
    size = backbone.default_cfg["input_size"][-1]
    images = torch.randint(0, 255, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.arange(batch, device=device) % CLASSES
    optimizer = make_optimizer(model, plan.recipe)
    step = TrainStep(model, normalise, optimizer, step_settings(plan.recipe, precision), print)
    torch.cuda.synchronize()
    prepared = Prepared(step, images, labels, torch.cuda.Stream())
    for seed in range(6):
        prepared(seed)
    torch.cuda.synchronize()
    return prepared


def seconds_a_round(steps: list[Prepared], count: int) -> float:
    """Seconds in which each of `steps` is taken once, all of them side by side."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for seed in range(count):
        for step in steps:
            step(seed)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def side_by_side(plan: RunPlan, batch: int, precision: str, most: int) -> Iterator[str]:
    """Lines: the throughput of 1, 2, 4, … independent runs on one GPU, each a captured step on its own stream."""
    steps: list[Prepared] = []
    alone = None
    while len(steps) < most:
        steps += [prepare(plan, batch, precision) for _ in range(max(1, len(steps)))]
        rate = len(steps) * batch / seconds_a_round(steps, 40)
        alone = alone or rate
        yield f"{plan.method_names}, batch {batch}: {len(steps)} side by side {rate:,.0f} images/s, {rate / alone:.2f}x"


@dataclass(frozen=True)
class Profile:
    """A captured step. seconds: time of one; times: µs of each of its kernels, by name."""

    seconds: float
    times: dict[str, list[float]]

    @property
    def busy_us(self) -> float:
        """Time in which a kernel runs."""
        return sum(map(sum, self.times.values()))

    @property
    def busy_share(self) -> float:
        return self.busy_us / 1e6 / self.seconds


def profile(plan: RunPlan, batch: int, precision: str) -> Profile:
    step = prepare(plan, batch, precision)
    seconds = seconds_a_round([step], 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(0)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[short_name(event.name)].append(event.time_range.end - event.time_range.start)
    return Profile(seconds, times)


def breakdown(plan: RunPlan, batch: int, precision: str, top: int = 16) -> Iterator[str]:
    """Lines of a table: where the time of one captured step goes."""
    found = profile(plan, batch, precision)
    kernels = sum(map(len, found.times.values()))
    yield (
        f"{plan.method_names}, batch {batch}, {precision}: {1e3 * found.seconds:.2f} ms a step, "
        f"{batch / found.seconds:,.0f} images/s; {kernels:,} kernels run for {found.busy_us / 1e3:.2f} ms: "
        f"busy {100 * found.busy_share:.0f} % of the time"
    )
    yield "| kernel | calls | µs each | ms | share |"
    yield "|---|---|---|---|---|"
    ranked = sorted(found.times.items(), key=lambda item: -sum(item[1]))
    rest = [t for _, times in ranked[top:] for t in times]
    for name, times in [*ranked[:top], (f"{len(ranked[top:])} others", rest)]:
        each, share = sum(times) / max(1, len(times)), sum(times) / found.busy_us
        yield f"| {name} | {len(times)} | {each:.1f} | {sum(times) / 1e3:.2f} | {100 * share:.0f} % |"


def short_name(name: str) -> str:
    if name.startswith("nvjet") or "gemm" in name:
        return "matrix products (cuBLAS)"
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name.split("(")[0].split("<")[0][:60]


# Whole tasks


def one_task(task: Path, outputs: Path) -> str:
    """A line: seconds from the start of `python train.py` to its end, with result.json."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides(task, outputs / "one", "lora_p_x")]
    started = time.monotonic()
    subprocess.run(command, check=True, cwd=outputs, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    (record,) = (outputs / "one").rglob(RESULT_FILE)
    return f"one task, `python train.py`: {seconds:.1f} s from start to exit ({record.name} written)"


def two_tasks(first: Path, second: Path, outputs: Path) -> str:
    """A line: seconds from the start of a sweep to its first result, and from there to its second."""
    names = f"dataset.folder={first}", f"dataset.name=bench/{first.name}"
    command = [text for text in overrides(first, outputs / "two", "lora_p_x") if text not in names]
    command += [f"dataset.folder={first},{second}", "dataset.name=bench/two"]
    started, began = time.monotonic(), time.time()
    sweep = [sys.executable, str(ROOT / "scripts" / "sweep_vtab1k.py"), *command]
    subprocess.run(sweep, check=True, cwd=outputs, stdout=subprocess.DEVNULL)
    written = sorted(file.stat().st_mtime for file in (outputs / "two").rglob(RESULT_FILE))
    return (
        f"two tasks, one sweep process: first result after {written[0] - began:.1f} s, second "
        f"{written[1] - written[0]:.1f} s later, {time.monotonic() - started:.1f} s in all"
    )


# The published code


def reference_rate(checkout: Path, batch: int, bf16: bool) -> float:
    """Images/s of the published code's LoRA_p(X), rank 64: forward, loss, backward, clipping, AdamW; no data loading.

    Raises: ImportError where it, mmpretrain or its CUDA kernels cannot be imported.
    """
    sys.path.insert(0, str(checkout / "vision"))
    import personal_lib.mmpretrain.models  # noqa: F401  (registers its models)
    from mmpretrain.registry import MODELS

    vim = {
        "type": "VisionMamba", "patch_size": 16, "embed_dim": 384, "depth": 24, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": False, "final_pool_type": "mean", "if_abs_pos_embed": True,
        "if_rope": False, "if_rope_residual": False, "bimamba_type": "v2", "if_cls_token": True,
        "if_devide_out": True, "use_middle_cls_token": True, "drop_path_rate": 0.1,
    }  # fmt: skip
    peft = {"type": "VimPEFTModel", "lora_X": True, "dim_X": 64, "s_X": 0.1, "bit_X": 32, "module": vim}
    model = MODELS.build(peft).cuda().train()
    head = torch.nn.Linear(384, CLASSES).cuda()
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    labels = torch.arange(batch, device="cuda") % CLASSES

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            features = model(images)
            loss = F.cross_entropy(head(features[-1] if isinstance(features, (tuple, list)) else features), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()

    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return batch / median(times[3:])


# Output


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    cells = [[f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in rows]
    return to_markdown(Table("", list(rows[0]), cells)).rstrip()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the training speed of every row, in one colour a batch size; a line at 0.6 of LoRA_p(X)'s."""
    rows = sorted(rows, key=lambda row: row["train_images_per_s"])
    figure = Figure(figsize=(7, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(sorted({row["batch"] for row in rows}), ("#0072B2", "#E69F00", "#009E73", "#CC79A7")))
    labels = [f"{row['method']} (batch {row['batch']})" if len(colours) > 1 else row["method"] for row in rows]
    bars = axes.barh(labels, [row["train_images_per_s"] for row in rows], color=[colours[row["batch"]] for row in rows])
    axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
    for bar in (0.6 * row["train_images_per_s"] for row in rows if row["method"] == "lora_p_x"):
        axes.axvline(bar, color="black", linestyle=":", linewidth=1)
        axes.annotate("0.6 of lora_p_x", (bar, 0), xytext=(3, -4), textcoords="offset points", fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="training images/s", title=f"{rows[0]['backbone']}, {rows[0]['precision']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.01)
    save_png(png(figure, dpi=150), path)


def measured_rows(options: argparse.Namespace, outputs: Path) -> Iterator[dict[str, Any]]:
    """A row for each backbone, batch, precision and method; those that cannot be run are named and left out."""
    task, kept = make_task(outputs / "small", options.test_images), Kept()
    for backbone in options.backbone:
        methods = presets(backbone) if options.methods == ["all"] else options.methods
        for batch, precision, method in itertools.product(options.batch, options.precision, methods):
            try:
                row = measure(task, outputs / "runs", backbone, method, batch, precision, kept, options.set)
            except UserError as error:
                print(f"{backbone}, {method}, batch {batch} is left out: {error}", flush=True)
                continue
            if options.busy:
                plan = plan_of_method(method, [f"backbone={backbone}", *options.set])
                row["busy_percent"] = round(100 * profile(plan, batch, precision).busy_share)
            print(row, flush=True)
            yield row


def report(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Prints the rows as a table and writes them to `out`."""
    if rows:
        print(table(rows))
    if rows and out:
        write_rows(Path(f"{out}.csv"), rows)
        plot(rows, Path(f"{out}.png"))


def measure_steps(options: argparse.Namespace, backbone: str) -> None:
    """Prints the requested measurements of single steps: their profile, and several of them on one GPU."""
    more = [f"backbone={backbone}", *options.set]
    for method, batch in itertools.product(options.profile, options.batch):
        plan = plan_of_method(method, more)
        print("\n".join(breakdown(plan, batch, options.precision[0])), flush=True)
    for method in options.methods if options.side_by_side else ():
        plan = plan_of_method(method, more)
        for line in side_by_side(plan, options.batch[0], options.precision[0], options.side_by_side):
            print(line, flush=True)


def check_guard(card: str, outputs: Path, write: bool) -> bool:
    """Runs the guard's cases, and compares them with the record or writes it; False: something became worse."""
    task, kept, found = make_task(outputs / "small", test_images=512), Kept(), []
    for backbone, method, batch in guard.CASES:
        milliseconds = guard.reference_ms()
        row = measure(task, outputs / "runs", backbone, method, batch, "bf16", kept, [])
        found.append(guard.measurement(card, row, milliseconds, stamp()))
        print(found[-1], flush=True)
    if write:
        guard.write_measurements(GUARD_FILE, found)
        return True
    lines, holds = guard.compare(guard.read_measurements(GUARD_FILE), found)
    print("\n".join(lines))
    return holds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["lora_p_x"], help="presets, or `all`; none: no such runs")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--precision", nargs="+", default=["bf16"])
    parser.add_argument("--backbone", nargs="+", default=["vim_s"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of train.py's overrides")
    parser.add_argument("--test-images", type=int, default=512, help="for a rate of the test, give 10,000 or more")
    parser.add_argument("--busy", action="store_true", help="also the share of a step in which the GPU works")
    parser.add_argument("--profile", nargs="*", default=[], metavar="METHOD")
    parser.add_argument("--side-by-side", type=int, default=0, metavar="K", help="up to K independent runs on one GPU")
    parser.add_argument("--whole-task", action="store_true")
    parser.add_argument("--reference", type=Path, metavar="PATH", help="a checkout of the published MambaPEFT code")
    parser.add_argument(
        "--guard",
        nargs="?",
        const="compare",
        choices=["compare", "write"],
        help="compare with docs/guard.csv, or write it",
    )
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.png")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "error: this benchmark needs a CUDA GPU, and there is none here\n")
    card = torch.cuda.get_device_name()
    print(stamp(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        if options.guard:
            parser.exit(0 if check_guard(card, Path(temporary), options.guard == "write") else 1)
        if options.methods:
            rows = list(measured_rows(options, Path(temporary)))
            report(rows, options.out)
        for backbone in options.backbone:
            measure_steps(options, backbone)
        if options.whole_task:
            first, second = (make_task(Path(temporary) / name, test_images=10_000) for name in ("first", "second"))
            print(one_task(first, Path(temporary)), flush=True)
            print(two_tasks(first, second, Path(temporary)), flush=True)
    if options.reference:
        for batch in options.batch:
            for bf16 in (False, True):
                try:
                    rate = f"{reference_rate(options.reference, batch, bf16):,.0f} images/s"
                except (ImportError, RuntimeError) as error:
                    rate = f"does not run here: {str(error).splitlines()[0]}"
                print(f"published code, LoRA_p(X), batch {batch}, {'bf16 autocast' if bf16 else 'fp32'}: {rate}")
