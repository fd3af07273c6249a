"""Random compositions of backbone, methods, recipe and task: what a config could say, drawn from a seed."""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambapeft_vision.adapter.presets import read_presets
from mambapeft_vision.run.config import METHOD_SIZES

PRESETS = read_presets(Path(__file__).resolve().parents[2] / "configs" / "method")
ON_VIM = [name for name, preset in PRESETS.items() if preset.backbone.startswith("vim")]
ON_VIT = [name for name, preset in PRESETS.items() if preset.backbone.startswith("vit")]
ON_BOTH = (
    "scratch",
    "full",
    "linear_probe",
    "bitfit",
    "cls_token",
    "pos_embed",
    "prompt",
    "prompt_wo_proj",
    "lora_embed",
)
NAMES_IN_VIM = [
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "norm_f.weight",
    "layers.*.norm.weight",
    "layers.0.mixer.in_proj.weight",
    "layers.*.mixer.out_proj.weight",
    "layers.*.mixer.x_proj*.weight",
    "layers.*.mixer.dt_proj.weight",
    "layers.*.mixer.dt_proj_b.bias",
    "layers.*.mixer.conv1d.weight",
    "layers.*.mixer.A_log",
    "layers.*.mixer.D",
    "layers.**",
]
NAMES_IN_VIT = [
    "cls_token",
    "patch_embed.proj.weight",
    "norm.*",
    "blocks.*.attn.qkv.weight",
    "blocks.0.mlp.*.weight",
    "blocks.*.mlp.fc1.bias",
    "blocks.**",
]


@dataclass(frozen=True)
class Composition:
    """One draw. config: what a run's config would be; classes, images: of the task."""

    number: int
    presets: tuple[str, ...]
    config: dict[str, Any]
    classes: int
    images: int

    def __str__(self) -> str:
        return f"composition {self.number} ({'+'.join(self.presets)}): {self.config}"


def draw(number: int) -> Composition:
    """The composition of that number; the same on every machine."""
    rng = random.Random(f"composition {number}")
    vit = rng.random() < 0.2
    presets = tuple(rng.sample([*ON_VIT, *ON_BOTH] if vit else ON_VIM, rng.randint(1, 3)))
    names = NAMES_IN_VIT if vit else NAMES_IN_VIM
    specs = {name: spec for preset in presets for name, spec in PRESETS[preset].methods.items()}
    config = {
        "backbone": _vit(rng) if vit else _vim(rng),
        "dataset": {"name": "drawn/task"},
        "trainer": _recipe(rng),
        "logger": {},
        "method": {name: _varied(spec, names, rng) for name, spec in specs.items()},
        "method_sizes": "given" if vit else rng.choice(METHOD_SIZES),
        "seed": rng.randrange(1000),
        "kernel": "auto",
        "resume": True,
        "dry_run": False,
        "sweep": None,
        "paths": {"data": "data", "outputs": "outputs", "cache": None, "methods": None, "backbones": None},
    }
    return Composition(number, presets, config, classes=rng.randint(2, 6), images=rng.randint(2, 4))


def _vim(rng: random.Random) -> dict[str, Any]:
    return {
        "_target_": "mambapeft_vision.backbones.create_backbone",
        "name": "vim_pico_patch8_32",
        "weights": "random",
        "seed": rng.randrange(1000),
        "depth": rng.randint(1, 2),
        "embed_dim": rng.choice([8, 24, 32]),
        "d_state": rng.choice([1, 2, 8]),
        "d_conv": rng.choice([3, 4]),
        "expand": rng.choice([1, 2]),
        "dt_rank": rng.choice([None, 1, 3]),
        "stride": rng.choice([None, 6]),
        "drop_path_rate": rng.choice([0.0, 0.2]),
    }


def _vit(rng: random.Random) -> dict[str, Any]:
    return {
        "_target_": "mambapeft_vision.backbones.create_backbone",
        "name": "ported_deit_small_patch16_224",
        "weights": "random",
        "seed": rng.randrange(1000),
        "img_size": 32,
        "patch_size": rng.choice([8, 16]),
        "depth": rng.randint(1, 2),
        "embed_dim": rng.choice([16, 32]),
        "num_heads": rng.choice([1, 2]),
        "drop_path_rate": rng.choice([0.0, 0.2]),
    }


def _varied(spec: dict[str, Any], names: list[str], rng: random.Random) -> dict[str, Any]:
    """A preset's method with other sizes, scales and options and, sometimes, in other places."""
    spec = copy.deepcopy(spec)
    for key in ("rank", "tokens", "states", "n_blocks", "dim", "warmup_steps", "chunks"):
        if spec.get(key) is not None:
            spec[key] = rng.choice([1, 2, 3, 7, 40])
    if "budget" in spec:
        spec["budget"] = rng.choice([1, 50, 10**6])
    for key in ("scale", "alpha"):
        if key in spec:
            spec[key] = rng.choice([0.0, 0.1, 1.0, -2.0, 3])
    spec["lr_mult"] = rng.choice([1.0, 0.1, 5, 0.0])
    spec["decay_mult"] = rng.choice([1.0, 0.0, 100])
    for key, values in _CHOICES.get(spec["_target_"].rpartition(".")[2], {}).items():
        if rng.random() < 0.3:
            spec[key] = rng.choice(values)
    if "dropout" in spec:
        spec["dropout"] = 0.0 if spec.get("space") == "weight" else rng.choice([0.0, 0.1, 0.9])
    if "targets" in spec and rng.random() < 0.2:
        spec["targets"] = rng.choice([rng.choice(names), rng.sample(names, 2)])
    return spec


_CHOICES: dict[str, dict[str, list[Any]]] = {
    "LoRA": {"space": ["activation", "weight"], "rows": ["x", None, None, None]},
    "DoRA": {"rows": ["x", "z", None]},
    "Affix": {
        "position": ["prefix", "infix", "around_class"],
        "directions": ["single", "dual"],
        "inner": [True, False],
        "projection": [True, False],
        "lean": [True, False],
    },
    "Prompt": {"position": ["prefix_suffix", "prefix", "infix", "suffix"], "projection": [True, False]},
    "AdditionalScan": {
        "position": ["before", "after"],
        "init": ["copy", "arange"],
        "zero_c": [True, False],
    },
    "StateOffset": {"form": ["state", "output"]},
    "Memba": {"tau": [0, 0.5, 1.0], "threshold": [1.0, 0.1, float("inf")], "transfer": [True, False]},
    "ProDiaL": {"diagonal": ["free", "relu"]},
    "SDT": {"f_channels": [0.0, 0.5, 0.99], "f_states": [0.0, 0.75], "f_off": [0.0, 0.1]},
    "Unfreeze": {"reinitialise": [True, False], "no_decay": [None, ["cls_token"]], "flat_decay_mult": [0.0, 1]},
}


def _recipe(rng: random.Random) -> dict[str, Any]:
    return {
        "max_epochs": 2,
        "learning_rate": rng.choice([1e-3, 1e-2]),
        "min_lr": 1e-5,
        "weight_decay": rng.choice([0.0, 1e-2]),
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "warmup_epochs": rng.choice([0, 1]),
        "start_factor": 0.5,
        "clip_norm": rng.choice([None, 5.0]),
        "head_lr_mult": rng.choice([1.0, 10.0]),
        "head_decay_mult": 1.0,
        "precision": rng.choice(["fp32", "bf16"]),
        "micro_batch": rng.choice([None, 1, 3]),
        "cuda_graph": True,
        "device": "cpu",
        "devices": 1,
        "checkpoint_every_s": 0.0,
        "picture": False,
    }
