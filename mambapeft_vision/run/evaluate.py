"""`evaluate.py run=...`: builds a finished run's model from its folder, merges it and tests it again."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mambapeft_vision.adapter.files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from mambapeft_vision.adapter.files import Adapter, read_adapter
from mambapeft_vision.adapter.load import apply_adapter
from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.engine.predict import Predictions
from mambapeft_vision.methods import add_methods_folder
from mambapeft_vision.results.migrations import migrated_config
from mambapeft_vision.results.record import RESULT_FILE, RunRecord, read_record
from mambapeft_vision.run.assemble import Setup, assemble
from mambapeft_vision.run.config import TrainConfig
from mambapeft_vision.run.finish import test
from mambapeft_vision.run.run import CONFIG_FILE
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.environment import device_name, git_state, library_versions
from mambapeft_vision.utils.errors import UserError

EVALUATION_FILE = "evaluation.json"


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Tests the adapter in `cfg.run` and writes evaluation.json there; returns what it holds.

    Only `paths.methods` of this command can add code: a run's folder is data.
    Raises: UserError.
    """
    folder = Path(cfg.run).expanduser()
    if cfg.paths.methods is not None:
        add_methods_folder(cfg.paths.methods)
    record = read_record(folder)
    plan = make_plan(_with_moved_files(_read_config(folder / CONFIG_FILE), cfg))
    console = Console()
    adapter = read_adapter(folder)
    _check_same_task(adapter, record, plan)
    setup = assemble(
        plan,
        console,
        attach=lambda backbone, num_classes: _apply(adapter, backbone, num_classes),
        device=cfg.device,
        kernel=cfg.kernel,
    )
    unmerged = setup.model.merge()
    predictions = test(setup, console)
    evaluation = _evaluation(setup, record, predictions, unmerged)
    write_json(folder / EVALUATION_FILE, evaluation)
    console.say(
        f"accuracy {predictions.accuracy:.2%} of {len(predictions.labels):,} test images; "
        f"recorded {record.accuracy:.2%}. Written to {folder / EVALUATION_FILE}"
    )
    return evaluation


def _read_config(path: Path) -> DictConfig:
    """A run's config.yaml, checked against the schema."""
    try:
        text = path.read_text(encoding="utf-8")
        if "${" in text:  # OmegaConf would look up what it names, such as variables of the environment
            raise UserError(f"{path} holds references (${{...}}); expected resolved values, as a run writes them")
        config = migrated_config(OmegaConf.to_container(OmegaConf.create(text)))
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), config)
        assert isinstance(merged, DictConfig)  # a merge with a mapping is one
        return merged
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected the folder of a finished run") from error
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no config of a run: {error}; copy it again from where it was made") from error


def _check_same_task(adapter: Adapter, record: RunRecord, plan: RunPlan) -> None:
    """Raises UserError where the files of a run are of different tasks."""
    tasks = {ADAPTER_CONFIG_FILE: adapter.config.get("task"), RESULT_FILE: record.task, CONFIG_FILE: plan.task}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{task!r} ({file})" for file, task in tasks.items())
        raise UserError(f"{adapter.folder} holds files of different tasks: {listed}; expected those of one run")


def _apply(adapter: Adapter, backbone: Backbone, num_classes: int) -> AdaptedModel:
    if adapter.config["num_classes"] != num_classes:
        raise UserError(
            f"{adapter.folder / ADAPTER_CONFIG_FILE}: num_classes is {adapter.config['num_classes']}, but the task has "
            f"{num_classes}; give the images it was trained on (dataset_folder=...)"
        )
    return apply_adapter(adapter, backbone)


def _with_moved_files(config: DictConfig, cfg: DictConfig) -> DictConfig:
    if cfg.dataset_folder is not None:
        config.dataset.folder = cfg.dataset_folder
    if cfg.backbone_weights is not None:
        config.backbone.weights = cfg.backbone_weights
    return config


def _evaluation(setup: Setup, record: RunRecord, predictions: Predictions, unmerged: dict[str, str]) -> dict[str, Any]:
    commit, dirty = git_state()
    return {
        "task": record.task,
        "methods": record.methods,
        "seed": record.seed,
        "accuracy": predictions.accuracy,
        "recorded_accuracy": record.accuracy,
        "loss": predictions.loss,
        "recorded_loss": record.loss,
        "num_test": len(predictions.labels),
        "unmerged": unmerged,
        "test_images_per_second": predictions.images_per_second,
        "data_manifest": setup.task.manifest_hash,
        "device": str(setup.device),
        "device_name": device_name(setup.device),
        "kernel": setup.kernel,
        "precision": setup.precision,
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": library_versions(),
        "evaluated_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
