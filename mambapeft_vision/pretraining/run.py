"""One pretraining run, from its config to weights with their record."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors
import timm
import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig
from safetensors.torch import save as serialize
from torch import nn

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.engine.device import resolve_device
from mambapeft_vision.engine.errors import readable_errors
from mambapeft_vision.engine.loop import make_trainer, train
from mambapeft_vision.engine.precision import apply_precision
from mambapeft_vision.pretraining.callbacks import callbacks_of_pretraining, describe_accuracies
from mambapeft_vision.pretraining.checkpoint import checkpoint_file, identity, steps_done_in
from mambapeft_vision.pretraining.config import PretrainConfig, check_overrides, config_of, to_dict
from mambapeft_vision.pretraining.model import SharedBackbone, choose_kernel
from mambapeft_vision.pretraining.module import Pretraining, Rounds
from mambapeft_vision.pretraining.sources import load_source
from mambapeft_vision.pretraining.teacher import FEATURES, load_teacher
from mambapeft_vision.utils.atomic import write_bytes, write_json
from mambapeft_vision.utils.hashing import sha256_file

_CHECKED_IMAGES = 8  # on which kernels are compared with the definition


def run_pretraining(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Pretrains as the section `pretrain` of a composed config says, and returns the record.

    Args:
        overrides: overrides of the command line; those that only fine-tuning reads are refused.

    Raises: UserError.
    """
    check_overrides(overrides)
    return pretrain(config_of(cfg))


def pretrain(config: PretrainConfig, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Trains as `config` says, writes `<out>.safetensors` and `<out>.json`, and returns the record.

    Args:
        callbacks: Lightning callbacks, called after the run's own.

    Raises: UserError.
    """
    with readable_errors(
        f"pretraining {config.backbone}",
        place=config.out,
        other_place="pretrain.out=PATH",
        memory_remedy=f"Lower pretrain.batch_size (now {config.batch_size})",
    ):
        module = assemble(config)
        checkpoint = checkpoint_file(config)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.is_file():
            print(f"continues after step {steps_done_in(checkpoint, module.identity)}, from {checkpoint}", flush=True)

        def save(accuracies: dict[str, float]) -> dict[str, Any]:
            return save_weights(module.average.model.backbone, Path(config.out), make_record(module, accuracies))

        own = callbacks_of_pretraining(checkpoint, config.checkpoint_every_s, save)
        trainer = make_trainer(module.place, [*own, *callbacks], max_epochs=-1)
        train(trainer, module, Rounds(), module.place, checkpoint)
        # Saved weights are rounded to half precision, so the record must describe the rounded ones.
        round_to_half(module.average.model.backbone)
        accuracies = module.accuracies()
        record = save(accuracies)
        checkpoint.unlink(missing_ok=True)
        print(f"{describe_accuracies(accuracies)} with the saved weights; {config.out}.safetensors", flush=True)
        return record


def assemble(config: PretrainConfig) -> Pretraining:
    """Builds the module with its images, on its device."""
    torch.manual_seed(config.seed)
    backbone = create_backbone(config.backbone, "random", config.seed, **config.architecture)
    preprocessing = Preprocessing.from_timm(backbone.default_cfg)
    sources = [
        load_source(name, source, preprocessing, config.seed, config.workers) for name, source in config.sources.items()
    ]
    device = resolve_device(config.device)
    teacher = load_teacher(config.teacher, preprocessing).to(device) if config.teacher.weight else None
    apply_precision(config.precision)
    sources = [source.to(device) for source in sources]
    backbone.to(device)
    sample = sources[0].images[sources[0].train[:_CHECKED_IMAGES]].float() / 127.5 - 1
    kernel, difference = choose_kernel(backbone, config.kernel, device, sample)
    print(f"kernel {kernel} on {device}", flush=True)
    classes = {source.name: len(source.class_names) for source in sources}
    model = SharedBackbone(backbone, classes, FEATURES if teacher is not None else None).to(device)
    return Pretraining(
        model,
        sources,
        preprocessing,
        config,
        teacher,
        identity=identity(config, sources, device),
        facts={"kernel": kernel, "kernel_difference_from_naive": difference},
    )


def round_to_half(model: nn.Module) -> None:
    """Rounds every parameter to the nearest float16, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())


def save_weights(backbone: nn.Module, out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes the backbone as float16 safetensors and its record next to it. Returns the record with the hash."""
    out.parent.mkdir(parents=True, exist_ok=True)
    weights = out.with_name(f"{out.name}.safetensors")
    state = {name: tensor.half().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    write_bytes(weights, serialize(state))  # unlike safetensors' save_file, this says what a disk has against it
    parameters = sum(tensor.numel() for tensor in state.values())
    digest = sha256_file(weights)
    record = {"file": weights.name, "sha256": digest, "dtype": "float16", "parameters": parameters, **record}
    write_json(out.with_name(f"{out.name}.json"), record)
    return record


def make_record(module: Pretraining, accuracies: dict[str, float]) -> dict[str, Any]:
    """The record of the weights: input, data, accuracies, and how they were made."""
    config, preprocessing, device = module.config, module.preprocessing, module.place
    data = {
        source.name: {
            "sha256": source.sha256,
            "classes": len(source.class_names),
            "train_images": len(source.train),
            "held_out_images": len(source.held_out),
            "held_out_accuracy": accuracies[source.name],
        }
        for source in module.sources.values()
    }
    settings = to_dict(config)
    for section in settings["sources"].values():
        section["path"] = Path(section["path"]).name  # where it lay is nobody's business
    settings["out"] = Path(config.out).name
    return {
        "backbone": config.backbone,
        "input_size": [3, *preprocessing.size],
        "resize": f"{preprocessing.interpolation}, squash",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "data": data,
        "steps": module.steps_done,
        "planned_steps": module.total_steps,
        "seconds": round(module.seconds),
        **module.facts,
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
        "log": module.progress,
    }
