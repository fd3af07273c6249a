"""Tables of the benchmark pages, made from CSV files of docs/ and records of pretraining."""

import json
import re
from typing import Any

from pictures import KERNELS, rows
from reference import table

from mambapeft_vision.backbones.build import EMBEDDED_WEIGHTS

CASES = {
    "vim_s_b32": "Vim-S, batch 32",
    "vim_s_b256": "Vim-S, batch 256",
    "vim_s_b32_n22": "Vim-S, batch 32, 22 states",
    "vim_s_b8_l730": "Vim-S stride 8 (730 tokens), batch 8",
    "vim_ti_b32": "Vim-Ti, batch 32",
}
COLUMNS = {
    "train_images_per_s": "training images/s",
    "test_images_per_s": "test images/s",
    "peak_gib": "peak GiB",
    "trainable": "trained parameters",
}
FIGURE = re.compile(r"$|(\*\*)?[-–\d]\S*( (±|%|s|M|min).*)?$")  # empty, or begins as a number; ** is bold
WHOLES = {
    "mixer_forward_backward": "mixer core, forward + backward",
    "block_forward_backward": "block with LoRA_p(X) r 64, forward + backward",
    "block_evaluation": "block with LoRA_p(X) r 64, evaluation",
}


def csv_table(name: str) -> str:
    """A CSV file with names of columns in words, and thousands marked. Columns of figures are set to the right."""
    found = rows(name)
    lines = [[_with_thousands(cell) for cell in row.values()] for row in found]
    align = "".join("r" if all(FIGURE.match(cell) for cell in column) else "l" for column in zip(*lines, strict=True))
    return table([COLUMNS.get(column, column) for column in found[0]], lines, f"l{align[1:]}")


def _with_thousands(cell: str) -> str:
    return f"{int(cell):,}" if re.fullmatch(r"\d{4,}", cell) else cell


def nano_table() -> str:
    """The backbones that this project pretrained, from the records beside their weights."""
    lines = []
    for name, record in _nano_records():
        held_out = [f"{100 * source['held_out_accuracy']:.1f}" for source in record["data"].values()]
        minutes = f"{record['seconds'] / 60:.1f}"
        lines.append([f"`{name}`", f"{record['parameters']:,}", record["device"], minutes, *held_out])
    _, record = _nano_records()[0]
    sources = [f"{name} ({source['held_out_images']:,})" for name, source in record["data"].items()]
    header = ["backbone", "parameters", "card", "minutes", *sources]
    return table(header, lines, "lrlr" + "r" * len(sources))


def nano_log() -> str:
    """Accuracy on held-out images in the course of pretraining, backbone after backbone."""
    parts = []
    for name, record in _nano_records():
        sources = list(record["data"])
        lines = [
            [f"{entry['step']:,}", *(f"{100 * entry[f'accuracy_{source}']:.1f}" for source in sources)]
            for entry in record["log"]
            if f"accuracy_{sources[0]}" in entry
        ]
        parts.append(f"`{name}`:\n\n{table(['step', *sources], lines, 'r' * (len(sources) + 1))}")
    return "\n\n".join(parts)


def _nano_records() -> list[tuple[str, dict[str, Any]]]:
    """Name and record of each pretrained backbone of the package, vim_nano first."""
    files = sorted(EMBEDDED_WEIGHTS.glob("*_nano.json"), key=lambda file: (file.stem != "vim_nano", file.stem))
    return [(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in files]


def kernel_table(case: str) -> str:
    """Time of each kernel by backend, its floor, and the share of the floor that the CUDA kernel reaches."""
    found = {(row["kernel"], row["backend"]): row for row in rows("kernels.csv") if row["case"] == case}
    lines = []
    for key, label in (KERNELS | WHOLES).items():
        cuda, triton = found.get((key, "cuda")), found.get((key, "triton"))
        if cuda is None:
            continue
        known = cuda["floor_us"] != "nan"
        lines.append(
            [
                label,
                f"{float(cuda['us']):,.1f}",
                f"{float(triton['us']):,.1f}" if triton else "",
                f"{float(cuda['floor_us']):,.1f}" if known else "",
                cuda["bound"] if known else "",
                f"{float(cuda['fraction_of_floor']):.2f}" if known else "",
                f"{float(cuda['peak_MiB']):,.1f}",
            ]
        )
    header = ["kernel", "cuda µs", "triton µs", "floor µs", "set by", "share of floor", "MiB"]
    return table(header, lines, "lrrrlrr")


def backend_table(case: str) -> str:
    """The whole mixer and block, by backend."""
    found = {(row["kernel"], row["backend"]): float(row["us"]) for row in rows("kernels.csv") if row["case"] == case}
    lines = []
    for backend in ("cuda", "triton", "torch", "plain"):
        times = [found.get((key, backend)) for key in WHOLES]
        lines.append([f"`{backend}`", *("" if time is None else f"{time:,.1f}" for time in times)])
    return table(["backend", *WHOLES.values()], lines, "lrrr")


def size_table() -> str:
    """Scan and block of every measured size, CUDA backend."""
    found = {(row["case"], row["kernel"]): float(row["us"]) for row in rows("kernels.csv") if row["backend"] == "cuda"}
    columns = ["scan_forward", "scan_forward_saving", "scan_backward", "block_forward_backward", "block_evaluation"]
    lines = []
    for case, label in CASES.items():
        lines.append([label, *(f"{found[case, column]:,.1f}" for column in columns)])
    header = ["case", "scan, evaluation", "scan, training", "scan backward", "block, both ways", "block, evaluation"]
    return table(header, lines, "lrrrrr")


def training_table() -> str:
    """Training speed and memory of every preset at both batch sizes."""
    found = {(row["method"], row["batch"], row["precision"]): row for row in rows("training.csv")}
    base = float(found["lora_p_x", "32", "bf16"]["train_images_per_s"])
    lines = []
    for (name, batch, precision), row in found.items():
        if batch != "32" or precision != "bf16":
            continue
        large = found[name, "256", "bf16"]
        rate = float(row["train_images_per_s"])
        lines.append(
            [
                f"`{name}`",
                f"{int(row['trainable']):,}",
                f"{rate:,.0f}",
                f"{rate / base:.2f}",
                row["peak_gib"],
                f"{float(large['train_images_per_s']):,.0f}",
                large["peak_gib"],
            ]
        )
    header = ["preset", "parameters", "images/s, batch 32", "share of `lora_p_x`", "GiB", "images/s, batch 256", "GiB"]
    return table(header, lines, "lrrrrrr")


def published_speed_table() -> str:
    """LoRA_p(X) beside the published code."""
    lines = [
        [
            "mambapeft_vision",
            row["batch"],
            row["precision"],
            f"{float(row['train_images_per_s']):,.0f}",
            row["peak_gib"],
        ]
        for row in rows("training.csv")
        if row["method"] == "lora_p_x"
    ]
    lines += [
        ["published code", row["batch"], row["precision"], f"{float(row['train_images_per_s']):,.0f}", row["peak_gib"]]
        for row in rows("published_speed.csv")
    ]
    return table(["code", "batch", "precision", "training images/s", "peak GiB"], lines, "lrlrr")
