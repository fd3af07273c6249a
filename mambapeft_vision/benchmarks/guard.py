"""Checks whether training has become slower: a few runs against the rates in git, in units of a fixed piece of work.

Two cards of one name differ, and a card that others use is slower. So a rate is compared as images per reference: the
images trained in the time in which the same GPU, just before, multiplies two matrices and copies a tensor.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from mambapeft_vision.benchmarks.measured import csv_text
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError

CASES = (("vim_s", "lora_p_x", 32), ("vim_s", "lora_p_x", 256), ("vmamba_s", "lora_in_proj", 256))
# Share of the images per reference, from which a run counts as slower. Two runs of one machine differ by less than
# 0.01; the same code on two cards of one kind differed by 0.01 at batch 32 and by 0.05 at batch 256.
LOSS = 0.03
MORE_MEMORY = 0.02
_SIDE, _COPIED = 8192, 2**30  # side of the matrices; bytes of the tensor


@dataclass(frozen=True)
class Measurement:
    """One case on one card.

    Args:
        reference_ms: milliseconds of the fixed work, just before the run.
        measured: `measured.stamp` of the run; in every row, as the rows of a file are of several machines and commits.
    """

    card: str
    backbone: str
    method: str
    batch: int
    images_per_s: float
    reference_ms: float
    peak_gib: float
    measured: str

    @property
    def case(self) -> tuple[str, str, str, int]:
        return self.card, self.backbone, self.method, self.batch

    @property
    def images_per_reference(self) -> float:
        """Images trained in the time of the fixed work."""
        return self.images_per_s * self.reference_ms / 1000


def reference_ms(repeats: int = 20) -> float:
    """Milliseconds of the fixed work on the current GPU: a bf16 product of 8192 x 8192 matrices, a copy of 1 GiB."""
    left = torch.ones(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16)
    source = torch.zeros(_COPIED, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        left @ left
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[repeats // 4 :])


def measurement(card: str, row: Mapping[str, object], milliseconds: float, measured: str) -> Measurement:
    """From a row of `training.measure`."""
    return Measurement(
        card=card,
        backbone=str(row["backbone"]),
        method=str(row["method"]),
        batch=int(str(row["batch"])),
        images_per_s=float(str(row["train_images_per_s"])),
        reference_ms=round(milliseconds, 3),
        peak_gib=float(str(row["peak_gib"])),
        measured=measured,
    )


def read_measurements(path: Path) -> list[Measurement]:
    """The recorded ones; none where there is no file."""
    if not path.is_file():
        return []
    kinds = {"batch": int, "images_per_s": float, "reference_ms": float, "peak_gib": float}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Measurement(**{key: kinds.get(key, str)(value) for key, value in row.items()}) for row in rows]


def write_measurements(path: Path, new: Sequence[Measurement]) -> None:
    """Writes `new` in place of what was recorded of the same cases, and keeps the rest."""
    kept = {old.case: old for old in read_measurements(path)} | {one.case: one for one in new}
    write_text(path, csv_text([asdict(one) for one in kept.values()]))


def compare(recorded: Sequence[Measurement], found: Sequence[Measurement]) -> tuple[list[str], bool]:
    """Lines that say how `found` stands beside `recorded`, and whether none is slower or larger.

    Raises UserError where a case was never recorded on this card: nothing could be said.
    """
    known, lines, holds = {old.case: old for old in recorded}, [], True
    for one in found:
        old = known.get(one.case)
        if old is None:
            raise UserError(
                f"{one.backbone}, {one.method}, batch {one.batch} has no record on {one.card}; expected one to compare "
                f"with. Record this commit's: --guard write"
            )
        change = one.images_per_reference / old.images_per_reference - 1
        memory = one.peak_gib / old.peak_gib - 1
        worse = change < -LOSS or memory > MORE_MEMORY
        holds &= not worse
        lines.append(
            f"{'WORSE' if worse else 'holds'}  {one.backbone}, {one.method}, batch {one.batch}: "
            f"{one.images_per_s:,.0f} images/s, {change:+.1%} images per reference; {one.peak_gib} GiB, {memory:+.1%}"
        )
    return lines, holds
