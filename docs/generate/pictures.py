"""The pictures of README and documentation, drawn from CSV files and from the text below.

    python docs/generate/pictures.py            writes docs/images/*.svg

A test draws them again and compares: a picture in git is never older than its data.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from svg import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, YELLOW, Bar, Drawing, Point, bars, scatter

DOCS = Path(__file__).resolve().parents[1]
IMAGES = DOCS / "images"

LORA_AND_KIN = (
    *("lora_", "dora_", "prodial", "rslora", "pissa", "loha", "lokr", "hira", "vera", "miss", "c3a", "cdvft"),
    "fourierft",
)

# Family → colour and shape; the first family that holds a preset counts.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "baselines": (INK, "cross", ("scratch", "full", "linear_probe")),
    "several parts": (RED, "diamond", ("all", "hybrid", "hybrid_wo_proj", "memba", "sdt", "sdlora")),
    "LoRA and kin": (BLUE, "circle", LORA_AND_KIN),
    "rotations": (SKY, "diamond", ("oft", "boft", "hra")),
    "adapters": (PURPLE, "square", ("parallel_adapter", "pfeiffer", "houlsby", "convpass", "repadapter", "lst")),
    "tokens": (GREEN, "triangle", ("cls_token", "pos_embed", "prompt", "affix", "svp", "vpt_deep")),
    "state space": (ORANGE, "down", ("a", "d", "bias", "conv1d", "additional_scan", "state_offset", "output_offset")),
    "existing tensors": (YELLOW, "square", ("bitfit", "norm", "diffit", "ssf", "ia3", "gps")),
}


def rows(name: str) -> list[dict[str, str]]:
    """A CSV file of docs/; lines that start with # are comments."""
    with open(DOCS / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def family(preset: str) -> str:
    """The family of a preset. Names that end with _ stand for every preset that starts with them."""
    for name, (_, _, members) in FAMILIES.items():
        if any(preset == member or (len(member) > 3 and preset.startswith(member)) for member in members):
            return name
    raise KeyError(f"{preset} belongs to no family of docs/generate/pictures.py; add it to FAMILIES")


def accuracy() -> str:
    """Accuracy on the mini benchmark against trained parameters, the best at each size labelled."""
    measured = [(row["method"], int(row["trained"]), float(row["accuracy"])) for row in rows("mini.csv")]
    measured = [row for row in measured if row[1] > 0]
    best = _best_at_each_size(measured)
    points = []
    for name, trained, value in measured:
        colour, shape, _ = FAMILIES[family(name)]
        points.append(Point(trained, value, colour, shape, name if name in best else None))
    return scatter(
        points,
        title="Accuracy against trained parameters",
        x_label="trained parameters, without the head",
        y_label="mean top-1 in % of 13 small tasks (vim_nano, 3 seeds, the paper's recipe, 20 epochs)",
        legend=[(name, colour, shape) for name, (colour, shape, _) in FAMILIES.items()],
    )


def _best_at_each_size(measured: Sequence[tuple[str, int, float]]) -> set[str]:
    """Names of the presets that none with as few parameters beats, and of the references every reader looks for."""
    best, highest = {"lora_p_x", "scratch"}, float("-inf")
    for name, _, value in sorted(measured, key=lambda row: (row[1], -row[2])):
        if value > highest:
            best.add(name)
            highest = value
    return best


def speed() -> str:
    """Training speed of LoRA_p(X) beside the published code."""
    ours = {
        row["batch"]: float(row["train_images_per_s"]) for row in rows("training.csv") if row["method"] == "lora_p_x"
    }
    lines = [
        Bar(f"mambapeft_vision, batch {batch}, bf16", ours[batch], BLUE, f"{ours[batch]:,.0f}")
        for batch in ("32", "256")
    ]
    for row in rows("published_speed.csv"):
        rate = float(row["train_images_per_s"])
        lines.append(Bar(f"published code, batch {row['batch']}, {row['precision']}", rate, GREY, f"{rate:,.0f}"))
    return bars(
        sorted(lines, key=lambda line: "published" in line.label),
        title="Training images per second: Vim-S, LoRA_p(X)",
        subtitle="One NVIDIA H200. The published code was timed without data loading, in another session.",
    )


def training() -> str:
    """Training speed of every preset at batch 32, and at batch 256 as a line."""
    table = rows("training.csv")
    large = {row["method"]: float(row["train_images_per_s"]) for row in table if row["batch"] == "256"}
    small = [(row["method"], float(row["train_images_per_s"])) for row in table if row["batch"] == "32"]
    small = [row for row in small if row[0] != "linear_probe"]
    lines = []
    for name, rate in sorted(small, key=lambda row: -row[1]):
        colour, shape, _ = FAMILIES[family(name)]
        lines.append(Bar(name, rate, colour, f"{rate:,.0f} and {large[name]:,.0f}", large[name], shape))
    return bars(
        lines,
        title="Training images per second of every preset",
        subtitle="Vim-S, one NVIDIA H200, bf16. Bar: batch 32. Black line: batch 256. Without linear_probe.",
        label_width=160,
        row_height=20,
        legend=[(name, colour, shape) for name, (colour, shape, _) in FAMILIES.items()],
    )


KERNELS = {
    "scan_forward": "scan forward, evaluation",
    "scan_forward_saving": "scan forward, training",
    "scan_backward": "scan backward",
    "scan_backward_with_dA": "scan backward with dA",
    "conv_forward": "convolution + SiLU",
    "conv_backward": "convolution backward",
    "projections_forward": "x_proj, dt_proj, softplus",
    "dt_proj_backward": "dt_proj backward",
    "x_proj_backward": "x_proj backward",
    "norm_forward": "residual + RMSNorm",
    "norm_backward": "residual + RMSNorm backward",
}


def kernels() -> str:
    """Time of every CUDA kernel and its floor."""
    measured = {
        row["kernel"]: row for row in rows("kernels.csv") if row["case"] == "vim_s_b32" and row["backend"] == "cuda"
    }
    lines = []
    for key, label in KERNELS.items():
        row = measured[key]
        lines.append(Bar(label, float(row["us"]), SKY, f"{float(row['us']):.1f} µs", float(row["floor_us"])))
    return bars(
        lines,
        title="Kernels of one Vim-S block, batch 32",
        subtitle="One NVIDIA H200, backend cuda, both directions. Bar: measured. Black line: the floor.",
    )


def run() -> str:
    """A run in five boxes."""
    boxes = [
        ("compose", ["groups and overrides", "become one config"], "configs/"),
        ("plan", ["checked, resolved,", "fingerprint, folder"], "the run's identity"),
        ("assemble", ["data, backbone,", "methods, kernel"], "AdaptedModel"),
        ("fit", ["epochs of steps,", "checkpoints"], "metrics.csv"),
        ("finish", ["save, merge, test,", "record"], "result.json, last"),
    ]
    drawing = Drawing(960, 190, "One run: compose, plan, assemble, fit, finish")
    for i, (name, lines, product) in enumerate(boxes):
        x = 14 + 190 * i
        drawing.box(x, 20, 160, 92, fill="#eef5fb", stroke=BLUE)
        drawing.text(x + 80, 46, name, size=16, bold=True, anchor="middle")
        for row, line in enumerate(lines):
            drawing.text(x + 80, 72 + 18 * row, line, anchor="middle")
        drawing.text(x + 80, 134, product, anchor="middle", colour=GREY)
        if i < len(boxes) - 1:
            drawing.line(x + 162, 66, x + 188, 66, arrow=True)
    drawing.text(
        14, 172, "A finished run ends after plan. A killed run enters fit at its last checkpoint.", colour=GREY
    )
    return drawing.render()


def ports() -> str:
    """A Vim block with its ports."""
    drawing = Drawing(1120, 446, "A Vim block and its ports")
    stations = [
        (130, "RMSNorm", 90),
        (266, "in_proj", 90),
        (414, "conv1d + SiLU", 124),
        (576, "x_proj, dt_proj", 128),
        (742, "two scans", 104),
        (884, "out_proj", 90),
    ]
    y, height = 150, 56
    for x, name, width in stations:
        drawing.box(x, y, width, height, fill="#eef5fb", stroke=BLUE)
        drawing.text(x + width / 2, y + 33, name, anchor="middle", bold=True)
    drawing.line(60, y + 28, 128, y + 28, arrow=True)
    for (x, _, width), (following, _, _) in pairwise(stations):
        drawing.line(x + width, y + 28, following - 2, y + 28, arrow=True)
    drawing.line(974, y + 28, 1090, y + 28, arrow=True)
    drawing.text(366, y + 20, "x", colour=GREY)
    drawing.text(58, y + 48, "tokens", colour=GREY)
    # The gate's way around the scan.
    drawing.line(311, y + height, 311, 252)
    drawing.line(311, 252, 794, 252)
    drawing.line(794, 252, 794, y + height + 2, arrow=True)
    drawing.text(322, 246, "z, the gate", colour=GREY)
    for x, target, port, what in (
        (86, 86, "block.input", "or block.replace"),
        (278, 311, "in_proj.side", "branches: LoRA"),
        (466, 466, "mixer.affix", "tokens joined for the scan"),
        (702, 780, "state_offset, output_offset", "added inside the scan"),
        (908, 929, "out_proj.side", "LoRA, adapters"),
    ):
        _port(drawing, x, 60, port, what)
        drawing.line(x, 98, target, y + (26 if port.startswith("block") else -2), arrow=True)
    _port(drawing, 1046, 60, "block.tap", "read only")
    drawing.line(1046, y + 28, 1046, 100, arrow=True)
    _port(drawing, 552, 286, "mixer.gate", "a function of z")
    drawing.line(552, 286, 552, 254, arrow=True)
    # Beside the whole branch.
    drawing.line(243, y + 28, 243, 362)
    drawing.line(243, 362, 1000, 362)
    drawing.line(1000, 362, 1000, y + 30, arrow=True)
    _port(drawing, 760, 343, "block.mixer_branch", "adds to the branch's output")
    drawing.text(20, 30, "One block", size=15, bold=True)
    around = "Around the blocks: model.images, model.prompt, model.feature. Blocks with an MLP also have mlp_branch."
    drawing.text(20, 412, f"Dashed: activation ports, empty by default. {around}", colour=GREY)
    weights = "Weights (in_proj, conv1d, x_proj, dt_proj, A_log, D, out_proj) are read through weight ports."
    drawing.text(20, 434, weights, colour=GREY)
    return drawing.render()


def _port(drawing: Drawing, x: float, y: float, name: str, what: str) -> None:
    width = 8.0 * max(len(name), 0.86 * len(what)) + 14
    drawing.box(x - width / 2, y, width, 38, fill="#fdf3e0", stroke=ORANGE, dashed=True)
    drawing.text(x, y + 16, name, anchor="middle", bold=True)
    drawing.text(x, y + 32, what, anchor="middle", size=12)


def weight_port() -> str:
    """How a weight gets its value."""
    drawing = Drawing(980, 210, "A weight port: W becomes reshape(W + sum of deltas)")
    drawing.box(20, 80, 150, 52, fill="#eef5fb", stroke=BLUE)
    drawing.text(95, 102, "frozen weight W", anchor="middle", bold=True)
    drawing.text(95, 120, "checkpoint's key", anchor="middle", size=12)
    for i, (name, formula) in enumerate((("LoRA", "s · up · down"), ("DoRA", "f(W) − W"), ("Offset", "Δ"))):
        y = 20 + 60 * i
        drawing.box(240, y, 180, 46, fill="#fdf3e0", stroke=ORANGE, dashed=True)
        drawing.text(330, y + 19, f"delta of {name}", anchor="middle", bold=True)
        drawing.text(330, y + 36, formula, anchor="middle", size=12)
        drawing.line(170, 106, 238, y + 23, arrow=True)
        drawing.line(420, y + 23, 496, 106, arrow=True)
    drawing.box(498, 84, 110, 44)
    drawing.text(553, 111, "W + Σ delta", anchor="middle", bold=True)
    drawing.line(608, 106, 652, 106, arrow=True)
    drawing.box(654, 80, 150, 52, fill="#fdf3e0", stroke=ORANGE, dashed=True)
    drawing.text(729, 102, "reshape", anchor="middle", bold=True)
    drawing.text(729, 120, "extra states; one owner", anchor="middle", size=11)
    drawing.line(804, 106, 840, 106, arrow=True)
    drawing.text(846, 102, "weight that the", bold=True)
    drawing.text(846, 120, "backbone reads", bold=True)
    return drawing.render()


PICTURES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "speed": speed,
    "training": training,
    "kernels": kernels,
    "run": run,
    "ports": ports,
    "weight-port": weight_port,
}


def draw() -> Iterator[tuple[Path, str]]:
    """Every picture: where it lies, and what it holds."""
    for name, picture in PICTURES.items():
        yield IMAGES / f"{name}.svg", picture()


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for path, content in draw():
        path.write_text(content, encoding="utf-8")
        print(path)
