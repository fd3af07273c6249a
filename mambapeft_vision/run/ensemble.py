"""Ensembles of finished runs: the mean of their probabilities, from what each run stored of the test images."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambapeft_vision.engine.predict import TOP, Predictions
from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.results.predictions import read_class_names, read_probabilities
from mambapeft_vision.results.record import DERIVED, RunRecord, write_record
from mambapeft_vision.run.inputs import has_other_content
from mambapeft_vision.run.run_config import make_run_folder
from mambapeft_vision.utils.environment import git_state
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_json
from mambapeft_vision.utils.text import plain


@dataclass(frozen=True)
class Member:
    """A finished run: its folder and its result."""

    folder: Path
    record: RunRecord


def ensemble(members: Sequence[Member], out: Path, label: str | None = None) -> tuple[Path, RunRecord]:
    """Averages the probabilities of finished runs on the same test images, and records the result.

    Args:
        members: at least two, each one once; of any methods, seeds and backbones.
        out: the folder below which the result gets one of its own, as runs do.
        label: how tables name it; default: `3 seeds` for one method with three seeds, else `3 runs`.

    Returns: the folder and the result.
    Raises: UserError for runs on other images, or without stored probabilities.
    """
    distinct = {member.record.fingerprint: member for member in members}
    chosen = sorted(distinct.values(), key=_place)
    if len(chosen) < 2:
        raise UserError(f"an ensemble of {len(chosen)} run; expected at least two different ones")
    _check_same_images(chosen)
    total: np.ndarray | None = None
    labels: np.ndarray | None = None
    names: np.ndarray | None = None
    for member in chosen:
        shares, own_labels, own_names = read_probabilities(member.folder)
        if labels is not None and (len(labels) != len(own_labels) or (labels != own_labels).any()):
            raise UserError(f"{member.folder} was tested on other images than {chosen[0].folder}: the labels differ")
        if names is not None and own_names is not None and list(names) != list(own_names):
            raise UserError(f"{member.folder} was tested on other images than {chosen[0].folder}: the names differ")
        labels, names = own_labels, own_names if names is None else names
        total = shares.astype(np.float64) if total is None else _sum(total, shares)
    assert total is not None and labels is not None  # there are two members at least
    mean = total / len(chosen)
    record = _record(chosen, label or _label(chosen), mean, labels)
    folder = make_run_folder(out, record)
    image_names = [str(number) for number in range(len(labels))] if names is None else [str(name) for name in names]
    _predictions(mean, labels, record.loss).save(
        folder / PREDICTIONS_FILE, image_names, read_class_names(chosen[0].folder)
    )
    write_record(folder, record)
    return folder, record


def _place(member: Member) -> tuple[list[str], int, str]:
    """A sort key. The result takes its settings from the first member: it must be the same method on every task."""
    return member.record.methods, member.record.seed, member.record.fingerprint


def _sum(total: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Classes that only one of the two knows are no class to the other."""
    width = max(total.shape[1], shares.shape[1])
    wide = np.zeros((len(total), width))
    wide[:, : total.shape[1]] += total
    wide[:, : shares.shape[1]] += shares
    return wide


def _check_same_images(members: Sequence[Member]) -> None:
    """Raises UserError where runs were tested on other tasks, splits or files."""
    first = members[0]
    for member in members[1:]:
        for what, of in (
            ("task", lambda record: record.task),
            ("test split", lambda record: record.config["dataset"]["test_split"]),
            ("images (by their fingerprint)", lambda record: record.data_manifest),
        ):
            if of(member.record) != of(first.record):
                raise UserError(
                    f"{member.folder} has another {what} than {first.folder}: {plain(of(member.record))}, not "
                    f"{plain(of(first.record))}. Give runs that were tested on the same images"
                )
        if has_other_content(member.record, first.record):
            raise UserError(
                f"{member.folder} was tested on images of other content than {first.folder}. Give runs that were "
                f"tested on the same images"
            )


def _label(members: Sequence[Member]) -> str:
    methods = {tuple(member.record.methods) for member in members}
    seeds = {member.record.seed for member in members}
    if len(methods) == 1 and len(seeds) == len(members):
        return f"{len(members)} seeds"
    return f"{len(members)} methods" if len(seeds) == 1 and len(methods) == len(members) else f"{len(members)} runs"


def _predictions(mean: np.ndarray, labels: np.ndarray, loss: float) -> Predictions:
    order = np.argsort(-mean, axis=1, kind="stable")[:, :TOP]
    classes = torch.from_numpy(order)
    shares = torch.from_numpy(np.take_along_axis(mean, order, axis=1).astype(np.float32))
    return Predictions(classes[:, 0].clone(), torch.from_numpy(labels), classes, shares, loss, seconds=0.0)


def _record(members: Sequence[Member], label: str, mean: np.ndarray, labels: np.ndarray) -> RunRecord:
    records = [member.record for member in members]
    by_method: dict[str, int] = {}
    for record in records:
        for name, trained in record.trainable_by_method.items():
            by_method[name] = by_method.get(name, 0) + trained
    methods = {name: spec for record in records for name, spec in record.config["method"].items()}
    shares = np.take_along_axis(mean, labels[:, None], axis=1).clip(min=1e-12)
    return derived_record(
        records,
        "ensemble",
        label,
        methods=sorted(methods),
        seed=min(record.seed for record in records),
        accuracy=float((mean.argmax(axis=1) == labels).mean()),
        loss=float(-np.log(shares).mean()),
        trainable=sum(record.trainable for record in records),
        trainable_by_method=by_method,
        head=sum(record.head for record in records),
        unmerged={name: why for record in records for name, why in record.unmerged.items()},
        test_images_per_second=_one_after_another([record.test_images_per_second for record in records]),
        train_seconds=sum(record.train_seconds for record in records),
        wall_seconds=sum(record.wall_seconds for record in records),
        peak_memory_bytes=max(record.peak_memory_bytes for record in records),
        config={**records[0].config, "method": methods},
    )


def _one_after_another(rates: Sequence[float]) -> float:
    return 1 / sum(1 / rate for rate in rates) if all(rates) else 0.0


def derived_record(
    members: Sequence[RunRecord], kind: str, label: str, more: Mapping[str, Any] | None = None, **changes: Any
) -> RunRecord:
    """The result of something made from finished runs: the first one's, with what is other.

    Args:
        more: entries of the config's section `derived` beside kind, label and the members' fingerprints. The hash of
            the section is the result's fingerprint.
        changes: fields of the record.
    """
    fingerprints = sorted(record.fingerprint for record in members)
    derived = {"kind": kind, "label": label, "members": fingerprints, **(more or {})}
    commit, dirty = git_state()
    config = {**changes.pop("config", members[0].config), DERIVED: derived}
    return dataclasses.replace(
        members[0],
        fingerprint=sha256_json(derived),
        git_commit=commit,
        git_dirty=dirty,
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        config=config,
        **changes,
    )
