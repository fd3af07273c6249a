"""The command behind scripts/pretrain.py: from a config to weights with their record."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.pretraining.checkpoint import checkpoint_file, identity, read_checkpoint, write_checkpoint
from mambapeft_vision.pretraining.config import PretrainConfig, load_config, to_dict
from mambapeft_vision.pretraining.loop import Pretraining, describe_accuracies
from mambapeft_vision.pretraining.model import SharedBackbone, choose_kernel
from mambapeft_vision.pretraining.sources import Source, load_source
from mambapeft_vision.pretraining.teacher import FEATURES, load_teacher
from mambapeft_vision.utils.atomic import atomic_path, write_json
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_file

GOOD, BAD, INTERRUPTED = 0, 2, 130
_CHECKED_IMAGES = 8  # on which kernels are compared with the definition


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 good, 2 with the reason on stderr, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description="Pretrain a small backbone on labelled images (docs/pretraining.md)."
    )
    parser.add_argument(
        "config", type=Path, help="such as configs/pretrain/vim_nano.yaml or configs/pretrain/folder.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as minutes=5 or sources.mine.path=DIR")
    options = parser.parse_args(argv)
    return run(options.config, options.overrides)


def run(config: Path, overrides: Sequence[str]) -> int:
    """Pretrains as a config file with overrides says; returns the exit code, as `main` does."""
    try:
        pretrain(load_config(config, overrides))
        return GOOD
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from the latest checkpoint.", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return BAD


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Trains as `config` says, writes `<out>.safetensors` and `<out>.json`, and returns the record."""
    torch.manual_seed(config.seed)
    backbone = create_backbone(config.backbone, "random", config.seed, **config.architecture)
    preprocessing = Preprocessing.from_timm(backbone.default_cfg)
    sources = [
        load_source(name, source, preprocessing, config.seed, config.workers) for name, source in config.sources.items()
    ]
    device = _device(config.device)
    teacher = None if config.teacher is None else load_teacher(config.teacher, preprocessing).to(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    sources = [source.to(device) for source in sources]
    backbone.to(device)
    sample = sources[0].images[sources[0].train[:_CHECKED_IMAGES]].float() / 127.5 - 1
    kernel, difference = choose_kernel(backbone, config.kernel, device, sample)
    print(f"kernel {kernel} on {device}", flush=True)

    classes = {source.name: len(source.class_names) for source in sources}
    model = SharedBackbone(backbone, classes, FEATURES if teacher is not None else None).to(device)
    training = Pretraining(model, sources, preprocessing, config, teacher)
    file, run = checkpoint_file(config), identity(config, sources, device)
    state = read_checkpoint(file, run, device)
    if state is not None:
        training.restore(state)
        print(f"goes on after step {state['step']:,}, from {file}", flush=True)
    started = time.monotonic() - training.seconds_before
    facts = {"kernel": kernel, "kernel_difference_from_naive": difference}

    def save(step: int, accuracies: dict[str, float]) -> dict[str, Any]:
        progress = {"steps": step, "planned_steps": training.total_steps, "seconds": round(time.monotonic() - started)}
        record = make_record(config, preprocessing, sources, accuracies, training.log, {**progress, **facts}, device)
        return save_weights(training.average.model.backbone, Path(config.out), record)

    steps = training.run(save, lambda state: write_checkpoint(file, run, state))
    # What is saved is rounded to half precision, so that is what the record must speak of.
    round_to_half(training.average.model.backbone)
    accuracies = training.accuracies()
    record = save(steps, accuracies)
    file.unlink(missing_ok=True)
    print(f"{describe_accuracies(accuracies)} with the saved weights; {config.out}.safetensors", flush=True)
    return record


def round_to_half(model: nn.Module) -> None:
    """Rounds every parameter to the nearest float16, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())


def save_weights(backbone: nn.Module, out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes the backbone as float16 safetensors, and its record beside it; returns the record with the hash."""
    out.parent.mkdir(parents=True, exist_ok=True)
    weights = out.with_name(f"{out.name}.safetensors")
    state = {name: tensor.half().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    with atomic_path(weights) as temporary:
        save_file(state, temporary)
    parameters = sum(tensor.numel() for tensor in state.values())
    digest = sha256_file(weights)
    record = {"file": weights.name, "sha256": digest, "dtype": "float16", "parameters": parameters, **record}
    write_json(out.with_name(f"{out.name}.json"), record)
    return record


def make_record(
    config: PretrainConfig,
    preprocessing: Preprocessing,
    sources: list[Source],
    accuracies: dict[str, float],
    log: list[dict[str, Any]],
    facts: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """All that says what the weights are: input, data, accuracies, how they came about."""
    data = {
        source.name: {
            "sha256": source.sha256,
            "classes": len(source.class_names),
            "train_images": len(source.train),
            "held_out_images": len(source.held_out),
            "held_out_accuracy": accuracies[source.name],
        }
        for source in sources
    }
    settings = to_dict(config)
    for source in settings["sources"].values():
        source["path"] = Path(source["path"]).name  # where it lay is nobody's business
    settings["out"] = Path(config.out).name
    return {
        "backbone": config.backbone,
        "input_size": [3, *preprocessing.size],
        "resize": f"{preprocessing.interpolation}, squash",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "data": data,
        **facts,
        "config": settings,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "safetensors": safetensors.__version__,
        },
        "log": log,
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: PyTorch sees no CUDA GPU here; take device=cpu or device=auto.")
    return device
