"""One run from config to result: set up, fit, save, merge, test, record."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mambapeft_vision.engine.callbacks import History
from mambapeft_vision.engine.checkpoint import CHECKPOINT_FILE
from mambapeft_vision.engine.distributed import check_devices
from mambapeft_vision.engine.loop import fit
from mambapeft_vision.engine.predict import Predictions
from mambapeft_vision.methods import add_methods_folder
from mambapeft_vision.results.environment import device_name, git_state, library_versions, peak_memory_bytes
from mambapeft_vision.results.pictures import PAGE_FILE, draw_from_files, page_of_predictions, pictures_of
from mambapeft_vision.results.record import RunRecord, is_finished, read_record, write_record
from mambapeft_vision.run.assemble import FRESH, Setup, Sources, assemble
from mambapeft_vision.run.build import build_logger, build_model, resolve_device
from mambapeft_vision.run.config import STOP
from mambapeft_vision.run.failure_record import forget_failure, note_failure
from mambapeft_vision.run.report_lines import describe_counts, describe_recipe, describe_sizes, dry_run_report
from mambapeft_vision.run.rerun import check_inputs, compare, differences
from mambapeft_vision.run.run_config import RunPlan, make_plan, set_aside
from mambapeft_vision.utils.atomic import remove_leftovers, write_text
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.errors import NotFiniteError, UserError, disk_errors_of
from mambapeft_vision.utils.lock import locked
from mambapeft_vision.utils.progress import format_duration

CONFIG_FILE, OVERRIDES_FILE, LOG_FILE = "config.yaml", "overrides.yaml", "train.log"


def train(
    cfg: DictConfig, overrides: Sequence[str] = (), sources: Sources = FRESH, expected: RunRecord | None = None
) -> RunRecord | None:
    """Does what the config asks for: a dry run, a finished run's summary, or the (rest of the) run.

    Args:
        overrides: of the command line, kept in the run's folder.
        sources: of task and backbone.
        expected: the record of the run that is to be done again: its images and weights are asked for.
    Returns: the run's record; None for a dry run.
    Raises: UserError.
    """
    if cfg.paths.methods is not None:
        add_methods_folder(cfg.paths.methods)
    plan = make_plan(cfg)
    if cfg.dry_run:
        print(dry_run_report(plan))
        return None
    if cfg.resume and is_finished(plan.folder):
        return _finished_before(plan)
    kept = "What was written before is whole, and the same command goes on from there"
    with disk_errors_of(str(plan.folder), "paths.outputs=DIR", kept):
        return _train(plan, cfg.resume, overrides, sources, expected)


def _train(
    plan: RunPlan, resume: bool, overrides: Sequence[str], sources: Sources, expected: RunRecord | None
) -> RunRecord:
    aside = None
    if not resume and plan.folder.exists():
        with locked(plan.folder):
            aside = set_aside(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with locked(plan.folder):
        if resume and is_finished(plan.folder):  # by another process, since this one looked
            return _finished_before(plan)
        remove_leftovers(plan.folder)
        _write_config(plan, overrides)
        with Console(plan.folder / LOG_FILE) as console:
            if aside is not None:
                console.say(f"the run that was here is kept in {aside}")
            try:
                record = execute(plan, console, sources, expected)
            except Exception as error:
                note_failure(plan.folder, error, overrides)
                raise
            forget_failure(plan.folder)
            if expected is not None:
                console.say(compare(expected, record))
            return record


def _finished_before(plan: RunPlan) -> RunRecord:
    record = read_record(plan.folder)
    with suppress(OSError):  # there if the run was killed right after its end; the folder may be read-only
        (plan.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        forget_failure(plan.folder)
    print(f"{summarise(record, plan.folder)}\nThis run was finished before; resume=false runs it again.")
    return record


def execute(plan: RunPlan, console: Console, sources: Sources, expected: RunRecord | None = None) -> RunRecord:
    """Trains, saves and tests; result.json is written last. Raises UserError, also where the GPU is too small."""
    try:
        return _execute(plan, console, sources, expected)
    except torch.OutOfMemoryError as error:
        sizes = plan.config["dataset"]
        raise UserError(
            f"{plan.method_names} on {plan.task} needs more memory than the GPU has: {str(error).split('. If')[0]}. "
            f"Lower trainer.micro_batch (now {plan.recipe.micro_batch or sizes['batch_size']} images a pass), "
            f"dataset.batch_size (now {sizes['batch_size']}) or, if it was testing, dataset.test_batch_size (now "
            f"{sizes['test_batch_size']}); trainer.precision=bf16 needs half of what fp32 needs"
        ) from error


def _execute(plan: RunPlan, console: Console, sources: Sources, expected: RunRecord | None) -> RunRecord:
    started = time.monotonic()
    console.say(f"{plan.method_names} on {plan.task}, seed {plan.seed}, in {plan.folder}")
    device = resolve_device(plan.recipe.device)
    check_devices(plan.recipe.devices, device)
    setup = assemble(
        plan,
        partial(build_model, plan),
        device=device,
        kernel=plan.config["kernel"],
        console=console,
        sources=sources,
    )
    if expected is not None:
        check_inputs(expected, plan.config, setup.task.manifest_hash, setup.model.backbone_sha256)
        changed = differences(expected, library_versions(), git_state()[0], device_name(device))
        console.say(f"not as recorded: {', '.join(changed)}" if changed else "versions and device are as recorded")
    for line in (*describe_sizes(plan, setup.model), describe_counts(setup.model.counts())):
        console.say(line)
    console.say(describe_recipe(plan.recipe, setup.task.batch_size))
    logger = build_logger(plan)
    logger.start(plan)
    record = None
    try:
        history = fit(plan, setup, logger.log_epoch, console)
        setup.model.save(plan.folder, _adapter_metadata(plan))
        counts = setup.model.counts()
        unmerged = setup.model.merge()
        predictions = setup.test(console)
        _check_finite(plan, predictions)
        predictions.save(plan.folder)
        if plan.recipe.picture or logger.pictures:
            _draw(plan, setup, predictions)
        wall_seconds = time.monotonic() - started + history.seconds_before
        record = _make_record(plan, setup, counts, unmerged, history, predictions, wall_seconds)
    finally:
        logger.finish(record, pictures_of(plan.folder))
    write_record(plan.folder, record)
    (plan.folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # the adapter holds what it held
    console.say(summarise(record, plan.folder))
    return record


def summarise(record: RunRecord, folder: Path) -> str:
    """A finished run in a few lines."""
    correct = round(record.accuracy * record.num_test)
    lines = [
        ("result", f"{'+'.join(record.methods)} on {record.task}, seed {record.seed}"),
        ("accuracy", f"{record.accuracy:.2%} ({correct:,} of {record.num_test:,} test images)"),
        ("trained", f"{record.trainable:,} numbers and a head of {record.head:,}; {record.frozen:,} stayed frozen"),
        ("time", f"{format_duration(record.wall_seconds)}, of it {format_duration(record.train_seconds)} training"),
        (
            "speed",
            f"{record.train_images_per_second:,.0f} images/s in training, {record.test_images_per_second:,.0f} in the "
            f"test, on {record.device_name}",
        ),
        ("memory", f"{record.peak_memory_bytes / 2**20:,.0f} MiB at most"),
        ("files", str(folder)),
        *(("not merged", f"{name}: {reason}") for name, reason in record.unmerged.items()),
    ]
    return "\n" + "\n".join(f"  {name:<10} {text}" for name, text in lines)


def _write_config(plan: RunPlan, overrides: Sequence[str]) -> None:
    write_text(plan.folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(plan.config)))
    write_text(plan.folder / OVERRIDES_FILE, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))


def _adapter_metadata(plan: RunPlan) -> dict[str, Any]:
    commit, dirty = git_state()
    return {
        "task": plan.task,
        "seed": plan.seed,
        "fingerprint": plan.fingerprint,
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": library_versions(),
    }


def _draw(plan: RunPlan, setup: Setup, predictions: Predictions) -> None:
    images, _ = next(iter(setup.task.test_dataloader()))
    what = f"{plan.method_names} on {plan.task}, seed {plan.seed}"
    page_of_predictions(
        images[:32].numpy(),
        predictions.predicted[:32].tolist(),
        predictions.labels[:32].tolist(),
        plan.folder / PAGE_FILE,
        title=f"{what}: {predictions.accuracy:.1%} right",
    )
    draw_from_files(plan.folder, title=what, num_classes=setup.task.num_classes)


def _check_finite(plan: RunPlan, predictions: Predictions) -> None:
    if not math.isfinite(predictions.loss):
        raise NotFiniteError(
            f"the test loss of {plan.method_names} on {plan.task} is {predictions.loss}, though those of the training "
            f"were finite; set trainer.precision=fp32, or lower trainer.learning_rate",
            plan.recipe.on_nonfinite == STOP,
        )


def _make_record(
    plan: RunPlan,
    setup: Setup,
    counts: dict[str, Any],
    unmerged: dict[str, str],
    history: History,
    predictions: Predictions,
    wall_seconds: float,
) -> RunRecord:
    commit, dirty = git_state()
    last = history.rows[-1]
    return RunRecord(
        task=plan.task,
        group=setup.task.group,
        methods=plan.methods,
        seed=plan.seed,
        accuracy=predictions.accuracy,
        loss=predictions.loss,
        num_test=len(predictions.labels),
        epochs=len(history.rows),
        train_loss=last["loss"],
        train_accuracy=last["accuracy"],
        trainable=counts["trainable"],
        trainable_by_method=counts["by_method"],
        head=counts["head"],
        frozen=counts["frozen"],
        unmerged=unmerged,
        train_images_per_second=history.images_per_second,
        test_images_per_second=predictions.images_per_second,
        train_seconds=history.seconds,
        wall_seconds=wall_seconds,
        peak_memory_bytes=peak_memory_bytes(setup.device),
        device=str(setup.device),
        device_name=device_name(setup.device),
        kernel=setup.kernel,
        precision=setup.precision,
        backbone=setup.model.backbone.default_cfg["name"],
        backbone_sha256=setup.model.backbone_sha256,
        data_manifest=setup.task.manifest_hash,
        fingerprint=plan.fingerprint,
        git_commit=commit,
        git_dirty=dirty,
        versions=library_versions(),
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        config=plan.config,
    )
