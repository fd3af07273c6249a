"""Records of runs that never were, for tests of tables, plots and reports."""

from pathlib import Path

from omegaconf import OmegaConf

from mambapeft_vision.adapter.presets import read_preset
from mambapeft_vision.data.tasks import find_task
from mambapeft_vision.results.record import RunRecord

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def fake_record(task: str, preset: str, seed: int, accuracy: float, **changes) -> RunRecord:
    """A run of a preset as it is in configs/method, on Vim-S with official weights.

    changes: fields of the record; `trainer`, `dataset` and `backbone` change those sections of its config.
    """
    found = read_preset(CONFIGS / "method" / f"{preset}.yaml")
    known = find_task(task)
    trainer = OmegaConf.to_container(OmegaConf.load(CONFIGS / "trainer" / "default.yaml"))
    config = {
        "backbone": {"name": "vim_small_patch16_224", "weights": "official", "seed": 0} | changes.pop("backbone", {}),
        "dataset": {"name": task, "train_split": "train800val200", "test_split": "test", "batch_size": 32}
        | changes.pop("dataset", {}),
        "trainer": trainer | found.overrides.get("trainer", {}) | changes.pop("trainer", {}),
        "method": changes.pop("method", found.methods),
        "method_sizes": "given",
        "seed": seed,
        "sweep": None,
    }
    values = {
        "task": task,
        "group": known.group if known else "custom",
        "methods": sorted(config["method"]),
        "seed": seed,
        "accuracy": accuracy,
        "loss": 1.0,
        "num_test": known.num_test if known else 100,
        "epochs": 100,
        "train_loss": 0.5,
        "train_accuracy": 0.9,
        "trainable": found.count,
        "trainable_by_method": {},
        "head": 385 * (known.num_classes if known else 10),
        "frozen": 25_411_584,
        "unmerged": {},
        "train_images_per_second": 1000.0,
        "test_images_per_second": 2000.0,
        "train_seconds": 100.0,
        "wall_seconds": 120.0,
        "peak_memory_bytes": 2**30,
        "device": "cuda:0",
        "device_name": "a GPU",
        "kernel": "triton",
        "precision": "fp32",
        "backbone": config["backbone"]["name"],
        "backbone_sha256": "b" * 64,
        "data_manifest": f"manifest of {task}",
        "image_format": "jpeg",
        "class_names": None,
        "multi_label": False,
        "fingerprint": f"{task}/{preset}/{seed}",
        "git_commit": None,
        "git_dirty": None,
        "versions": {},
        "finished_at": "2026-01-01T00:00:00+00:00",
        "config": config,
    }
    return RunRecord(**{**values, **changes})
