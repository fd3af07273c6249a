"""The end of a run: save, merge, test, draw, record."""

import math
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mambapeft_vision.engine.callbacks import History
from mambapeft_vision.engine.config import STOP
from mambapeft_vision.engine.predict import Predictions, predict
from mambapeft_vision.results.layout import CHECKPOINT_FILE, CONFUSION_FILE, CURVES_FILE, PAGE_FILE, PREDICTIONS_FILE
from mambapeft_vision.results.predictions import read_labels
from mambapeft_vision.results.record import RunRecord, write_record
from mambapeft_vision.run.assemble import Setup
from mambapeft_vision.run.failure_record import forget_failure
from mambapeft_vision.run.inputs import CONTENT, OWN_BACKBONES, OWN_METHODS, own_backbone_sha256, own_methods_sha256
from mambapeft_vision.run.report_lines import summarise
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.console import Console, say, warned_of
from mambapeft_vision.utils.environment import device_name, git_state, library_versions, peak_memory_bytes
from mambapeft_vision.utils.errors import NotFiniteError
from mambapeft_vision.utils.timeline import mark


def finish(plan: RunPlan, setup: Setup, history: History, console: Console, *, started: float) -> RunRecord:
    """Saves the adapter, merges it, tests the merged model, and writes the result, which makes the run a finished one.

    Args:
        started: `time.monotonic()` at the beginning of this attempt.

    Raises: NotFiniteError for a test loss that is NaN or infinite.
    """
    setup.model.save(plan.folder, _adapter_metadata(plan, setup.task.content_hash))
    counts = setup.model.counts()
    unmerged = setup.model.merge()
    mark("merged")
    predictions = test(setup, console)
    mark("tested")
    _check_finite(plan, predictions)
    save_predictions(setup, predictions, plan.folder / PREDICTIONS_FILE)
    wall_seconds = time.monotonic() - started + history.seconds_before
    record = _make_record(plan, setup, counts, unmerged, history, predictions, wall_seconds)
    write_record(plan.folder, record)
    remove_leftovers(plan.folder)
    return record


def test(setup: Setup, console: Console) -> Predictions:
    """Tests the model as it is now on the task's test split."""
    return predict(
        setup.model,
        setup.normalise,
        setup.task.test_dataloader(),
        precision=setup.precision,
        device=setup.device,
        console=console,
        cuda_graph=setup.cuda_graph,
    )


def save_predictions(setup: Setup, predictions: Predictions, file: Path) -> None:
    """Writes what was predicted, with the names of images and classes."""
    predictions.save(file, setup.task.test_names, setup.task.class_names)


def finished_before(plan: RunPlan, record: RunRecord) -> RunRecord:
    """Returns the result of a run that is finished; says that it is not repeated."""
    remove_leftovers(plan.folder)
    say(f"{summarise(record, plan.folder)}\nThis run was finished before; resume=false runs it again.")
    return record


def remove_leftovers(folder: Path) -> None:
    """Removes files that only an unfinished run needs; a process killed right after the result leaves them behind."""
    with suppress(OSError):  # the folder may be read-only
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # the adapter holds what it held
        forget_failure(folder)


def _adapter_metadata(plan: RunPlan, content: str | None) -> dict[str, Any]:
    commit, dirty = git_state()
    return {
        "task": plan.task,
        "seed": plan.seed,
        "fingerprint": plan.fingerprint,
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions_of(plan, content),
    }


def versions_of(plan: RunPlan, content: str | None) -> dict[str, str]:
    """Versions of the libraries behind a run's result; hashes of the user's own files of code and of the images."""
    hashes = {OWN_METHODS: own_methods_sha256(plan), OWN_BACKBONES: own_backbone_sha256(plan), CONTENT: content}
    return library_versions() | {name: digest for name, digest in hashes.items() if digest is not None}


def draw(plan: RunPlan, setup: Setup) -> None:
    """Draws the pictures of a finished run. A picture that cannot be drawn is left out and named on stderr."""
    # Matplotlib comes with it, for which the start of a run need not wait.
    from mambapeft_vision.results.pictures import draw_from_files, page_of_predictions

    title = f"{plan.method_names} on {plan.task}, seed {plan.seed}"
    if setup.task.multi_label:  # neither a page nor a confusion matrix shows several labels
        draw_from_files(plan.folder, title=title)
        return
    with warned_of(PAGE_FILE):
        predicted, labels = read_labels(plan.folder)
        images, _ = next(iter(setup.task.test_dataloader()))
        page_of_predictions(
            images[:32].numpy(),
            predicted[:32].tolist(),
            labels[:32].tolist(),
            plan.folder / PAGE_FILE,
            title=f"{title}: {(predicted == labels).mean():.1%} right",
            class_names=setup.task.class_names,
        )
    with warned_of(f"{CURVES_FILE}, {CONFUSION_FILE}"):
        draw_from_files(plan.folder, title=title, num_classes=setup.task.num_classes)


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
        backbone=setup.model.backbone.pretrained_cfg["architecture"],
        backbone_sha256=setup.model.backbone_sha256,
        data_manifest=setup.task.manifest_hash,
        image_format=setup.task.image_format,
        fingerprint=plan.fingerprint,
        git_commit=commit,
        git_dirty=dirty,
        versions=versions_of(plan, setup.task.content_hash),
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        config=plan.config,
        class_names=None if setup.task.class_names is None else list(setup.task.class_names),
        multi_label=setup.task.multi_label,
    )
