"""Tables of the benchmark pages, made from the CSV files of docs/."""

from pictures import KERNELS, rows
from reference import table

CASES = {
    "vim_s_b32": "Vim-S, batch 32",
    "vim_s_b256": "Vim-S, batch 256",
    "vim_s_b32_n22": "Vim-S, batch 32, 22 states",
    "vim_s_b8_l730": "Vim-S stride 8 (730 tokens), batch 8",
    "vim_ti_b32": "Vim-Ti, batch 32",
}
WHOLES = {
    "mixer_forward_backward": "mixer core, forward + backward",
    "block_forward_backward": "block with LoRA_p(X) r 64, forward + backward",
    "block_evaluation": "block with LoRA_p(X) r 64, evaluation",
}


def csv_table(name: str) -> str:
    """A CSV file as it is; columns after the first are set to the right."""
    found = rows(name)
    header = list(found[0])
    return table(header, [list(row.values()) for row in found], "l" + "r" * (len(header) - 1))


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
                cuda["fraction_of_floor"] if known else "",
                cuda["peak_MiB"],
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
