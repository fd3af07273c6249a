"""`evaluate.py run=...`: builds a finished run's model from its folder, merges it and tests it again."""

import math
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mambapeft_vision.adapter.files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from mambapeft_vision.adapter.files import Adapter, read_adapter
from mambapeft_vision.adapter.load import apply_adapter, check_sizes
from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.engine.predict import Predictions
from mambapeft_vision.results.claims import computed
from mambapeft_vision.results.files import read_text
from mambapeft_vision.results.layout import (
    EVALUATION_FILE,
    EVALUATION_PREDICTIONS_FILE,
    RESULT_FILE,
    RUN_CONFIG_FILE,
)
from mambapeft_vision.results.migrations import migrated_config
from mambapeft_vision.results.record import RunRecord, read_record
from mambapeft_vision.run.assemble import Setup, assemble
from mambapeft_vision.run.config import TrainConfig
from mambapeft_vision.run.finish import save_predictions, test, versions_of
from mambapeft_vision.run.inputs import Fingerprints, Inputs, changed
from mambapeft_vision.run.own_code import OwnCode
from mambapeft_vision.run.report_lines import measure
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.environment import device_name, git_state
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import parse_yaml

NO_LOGGER = "mambapeft_vision.integrations.wandb_logger.NoLogger"
_NO_SIZES = ("_target_", "name", "weights", "weights_sha256", "weights_license", "seed")  # keys of `backbone`


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Tests the adapter in `cfg.run` and writes evaluation.json there; returns what it holds.

    A run's folder is data: it says what was computed. Where files are, and whose code runs, only this command says.
    Raises: UserError.
    """
    folder = user_path(cfg.run)
    own = OwnCode(cfg.paths.methods, cfg.paths.backbones)
    own.add()
    record = read_record(folder)
    adapter = read_adapter(folder)
    config = recorded_config(folder, cache=cfg.paths.cache, own=own)
    if cfg.dataset_folder is not None:
        config.dataset.folder, config.dataset.path = cfg.dataset_folder, None
        config.dataset.num_classes = config.dataset.get("num_classes") or adapter.config["num_classes"]
    if cfg.backbone_weights is not None:
        config.backbone.weights = cfg.backbone_weights
    plan = make_plan(config)
    console = Console()
    _check_same_task(adapter, record, plan)
    check_same_backbone(adapter, plan)
    setup = assemble(
        plan,
        console,
        attach=lambda backbone, num_classes: _apply(adapter, backbone, num_classes),
        device=cfg.device,
        kernel=cfg.kernel,
        test_only=True,
    )
    inputs = Inputs()
    now = Fingerprints.of_plan(plan, inputs.images(plan), setup.model.backbone_sha256, inputs.content(plan))
    other = changed(Fingerprints.of_record(record), now)
    if other:
        console.say(f"the {other} are not those that the run was made from")
    unmerged = setup.model.merge()
    predictions = test(setup, console)
    evaluation = _evaluation(plan, setup, record, predictions, unmerged, now.content)
    evaluation["data_manifest"] = now.images or setup.task.manifest_hash
    save_predictions(setup, predictions, folder / EVALUATION_PREDICTIONS_FILE)
    file = folder / EVALUATION_FILE
    write_json(file, evaluation)
    console.say(
        f"{measure(record)} {predictions.accuracy:.2%} of {len(predictions.labels):,} test images; "
        f"recorded {record.accuracy:.2%}. Written to {file}"
    )
    if not other and not math.isclose(predictions.loss, record.loss, rel_tol=0.01, abs_tol=1e-3):
        console.say(
            f"the test loss is {predictions.loss:.4g}, recorded {record.loss:.4g}: they differ by more than rounding. "
            f"A file of {folder} or the code has changed since"
        )
    return evaluation


def recorded_config(folder: Path, *, cache: str | None, own: OwnCode) -> DictConfig:
    """What a run's config.yaml says of what was computed, checked against the schema; the rest from the command.

    Args:
        cache, own: the folders of `paths` that the command gives.
    """
    path = folder / RUN_CONFIG_FILE
    content = parse_yaml(read_text(path, "the folder of a finished run"), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} is no config of a run: expected keys and values; copy it again from where it was made")
    recorded = content.get("paths")
    data = recorded.get("data") if isinstance(recorded, dict) else None
    paths = {"data": str(data), "outputs": str(folder), "cache": cache, **asdict(own)}
    command: dict[str, Any] = {"paths": paths, "logger": {"_target_": NO_LOGGER}, "resume": True, "dry_run": False}
    try:
        # Migrated like any config of an earlier release; what follows is checked by make_plan.
        config = OmegaConf.merge(OmegaConf.structured(TrainConfig), computed(migrated_config(content)), command)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path} is no config of a run: {plain(error)}; copy it again from where it was made") from None
    assert isinstance(config, DictConfig)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{path} lacks {plain(', '.join(missing))}; copy it again from where it was made")
    return config


def _check_same_task(adapter: Adapter, record: RunRecord, plan: RunPlan) -> None:
    """Raises UserError where the files of a run are of different tasks."""
    tasks = {ADAPTER_CONFIG_FILE: adapter.config.get("task"), RESULT_FILE: record.task, RUN_CONFIG_FILE: plan.task}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{shown(task)} ({file})" for file, task in tasks.items())
        raise UserError(f"{adapter.folder} holds files of different tasks: {listed}; expected those of one run")


def check_same_backbone(adapter: Adapter, plan: RunPlan) -> None:
    """Raises UserError where config.yaml asks for another backbone than the adapter's, before memory is used for it."""
    spec = adapter.config["backbone"]
    sizes = {key: value for key, value in plan.backbone.items() if key not in _NO_SIZES}
    others = [key for key, value in sizes.items() if key in spec["architecture"] and spec["architecture"][key] != value]
    if plan.backbone.get("name") != spec["name"] or others:
        what = f"{others[0]}={shown(sizes[others[0]])}" if others else shown(plan.backbone.get("name"))
        raise UserError(
            f"{adapter.folder} holds files of different backbones: {RUN_CONFIG_FILE} has {what}, {ADAPTER_CONFIG_FILE} "
            f"another; expected those of one run"
        )
    check_sizes(adapter)


def _apply(adapter: Adapter, backbone: Backbone, num_classes: int) -> AdaptedModel:
    if adapter.config["num_classes"] != num_classes:
        raise UserError(
            f"{adapter.folder / ADAPTER_CONFIG_FILE}: num_classes is {adapter.config['num_classes']}, but the task has "
            f"{num_classes}; give the images it was trained on (dataset_folder=...)"
        )
    return apply_adapter(adapter, backbone)


def _evaluation(
    plan: RunPlan,
    setup: Setup,
    record: RunRecord,
    predictions: Predictions,
    unmerged: dict[str, str],
    content: str | None,
) -> dict[str, Any]:
    commit, dirty = git_state()
    return {
        "task": record.task,
        "methods": record.methods,
        "seed": record.seed,
        "accuracy": predictions.accuracy,
        "recorded_accuracy": record.accuracy,
        "measure": measure(record),
        "class_names": None if setup.task.class_names is None else list(setup.task.class_names),
        "loss": predictions.loss,
        "recorded_loss": record.loss,
        "num_test": len(predictions.labels),
        "unmerged": unmerged,
        "test_images_per_second": predictions.images_per_second,
        "device": str(setup.device),
        "device_name": device_name(setup.device),
        "kernel": setup.kernel,
        "precision": setup.precision,
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions_of(plan, content),
        "evaluated_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
