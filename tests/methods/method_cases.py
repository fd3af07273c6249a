"""Rows of the behaviour matrix: every preset in configs/method and some hybrids; and tiny models to try them on."""

import zlib
from pathlib import Path

import torch

from mambapeft_vision.adapt import AdaptedModel, adapt, build_method
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.presets import Preset, read_presets

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = read_presets(CONFIGS / "method")
HYBRIDS = [
    ("lora_in_proj", "affix", "a"),
    ("additional_scan", "lora_x_proj", "lora_p_b", "a"),
    ("prompt", "affix_wo_proj", "lora_p_x", "dora_p_x"),
    ("full", "lora_out_proj", "prompt_wo_proj"),
    ("bias", "d", "conv1d", "pos_embed", "cls_token", "lora_embed", "parallel_adapter"),
]
ROWS = [(name,) for name in PRESETS] + HYBRIDS
CLASSES = 5

VIM_TINY = {"depth": 2, "embed_dim": 32, "drop_path_rate": 0.0}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1])


def preset(name: str) -> Preset:
    return PRESETS[name]


def row_name(row: tuple[str, ...]) -> str:
    return "+".join(row)


def specs(row: tuple[str, ...]) -> dict[str, dict]:
    """What `method=[...]` makes of several presets: their methods together."""
    return {name: spec for preset_name in row for name, spec in PRESETS[preset_name].methods.items()}


def methods_of(given: dict[str, dict]):
    return {name: build_method(name, spec, "test") for name, spec in given.items()}


def tiny_backbone(row: tuple[str, ...] = (), dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A very small backbone of the kind that the presets of `row` are for."""
    return create_backbone("vim_pico_patch8_32", "random", **VIM_TINY).to(dtype)


def tiny_model(row: tuple[str, ...], dtype: torch.dtype = torch.float64, seed: int = 3) -> AdaptedModel:
    return adapt(tiny_backbone(row, dtype), methods_of(specs(row)), CLASSES, seed)


@torch.no_grad()
def move(model: AdaptedModel) -> AdaptedModel:
    """Takes every trained tensor away from its start (by an amount that depends on its name only)."""
    for name, p in model.trained().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return model
