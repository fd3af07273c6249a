"""Rows of the behaviour matrix: every preset in configs/method and some hybrids; and tiny models to try them on."""

import copy
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.adapter.presets import read_presets
from mambapeft_vision.backbones import create_backbone

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = read_presets(CONFIGS / "method")
#: In a row: on the transformer backbone, which the presets of the row also fit.
ON_VIT = "on ViT"
#: In a row: the methods have finished their warm-up phase.
WARMED_UP = "warmed up"
HYBRIDS: list[tuple[str, ...]] = [
    ("lora_in_proj", "affix", "a"),
    ("additional_scan", "lora_x_proj", "lora_p_b", "a"),
    ("prompt", "affix_wo_proj", "lora_p_x", "dora_p_x"),
    ("full", "lora_out_proj", "prompt_wo_proj"),
    ("memba", "sdt", "output_offset", "affix_wo_proj"),
    ("sdlora", WARMED_UP, "additional_scan", "state_offset", "prodial"),
    ("bias", "d", "conv1d", "pos_embed", "cls_token", "lora_embed", "parallel_adapter"),
]
ROWS = [
    *((name,) for name in PRESETS),
    *((name, WARMED_UP) for name in PRESETS if any("warmup_steps" in m for m in PRESETS[name].methods.values())),
    *HYBRIDS,
    *((name, ON_VIT) for name in ("scratch", "full", "linear_probe", "bitfit", "cls_token", "prompt", "lora_embed")),
    ("lora_qv", "fact_tk", "adaptformer", "adapter_plus", "prompt", "pos_embed"),
    *((name, ON_VIT) for name in ("svp", "ssf", "vpt_deep", "convpass", "houlsby", "pfeiffer", "diffit", "gps", "lst")),
    ("svp", "vpt_deep", "convpass", "repadapter", "lora_p_x"),
    ("ssf", "houlsby", "lst", "affix", "lora_in_proj"),
    ("diffit", "repadapter_wo_bias", "pfeiffer", "gps"),
]
CLASSES = 5

VIM_TINY = {"depth": 2, "embed_dim": 32, "drop_path_rate": 0.0}
VIT_TINY = {**VIM_TINY, "img_size": 32, "patch_size": 8, "num_heads": 2}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1])


def row_name(row: tuple[str, ...]) -> str:
    return "+".join(row)


def specs(row: tuple[str, ...]) -> dict[str, dict]:
    """What `method=[...]` makes of several presets: their methods together."""
    presets = [PRESETS[name] for name in row if name not in (ON_VIT, WARMED_UP)]
    return {name: spec for preset in presets for name, spec in preset.methods.items()}


def methods_of(given: dict[str, dict]):
    return {name: build_method(name, spec, "test") for name, spec in given.items()}


def tiny_backbone(row: tuple[str, ...] = (), dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A very small backbone of the kind that the presets of `row` are for."""
    if ON_VIT in row or any(PRESETS[name].backbone.startswith("vit") for name in row if name in PRESETS):
        return fresh("ported_deit_small_patch16_224", **VIT_TINY).to(dtype)
    registers = any(PRESETS[name].backbone.startswith("mambareg") for name in row if name in PRESETS)
    name = "mambareg_pico_patch8_32" if registers else "vim_pico_patch8_32"
    return fresh(name, **VIM_TINY).to(dtype)


def fresh(name: str, **sizes: Any) -> torch.nn.Module:
    """As `create_backbone` makes it with random weights; each is made once, and copied in a third of the time."""
    return copy.deepcopy(_made(name, **sizes))


@cache
def _made(name: str, **sizes: Any) -> torch.nn.Module:
    return create_backbone(name, "random", **sizes)


def tiny_model(row: tuple[str, ...], dtype: torch.dtype = torch.float64, seed: int = 3) -> AdaptedModel:
    model = adapt(tiny_backbone(row, dtype), methods_of(specs(row)), CLASSES, seed)
    if WARMED_UP in row:
        finish_warmup(model)
    return model


def pooled(backbone: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the head gets, [B, D]."""
    return backbone.forward_head(backbone.forward_features(images), pre_logits=True)


def finish_warmup(model: AdaptedModel) -> None:
    """Ends the warm-up of every method that has one, as if some steps had been trained."""
    for name, method in model.methods.items():
        if method.warming_up:
            for key, p in method.owned().items():
                _move(f"{name}.{key}", p)
            method.finish_warmup()


def move(model: AdaptedModel) -> AdaptedModel:
    """Takes every trained tensor away from its start (by an amount that depends on its name only)."""
    for name, p in model.trained().items():
        _move(name, p)
    return model


@torch.no_grad()
def _move(name: str, p: torch.Tensor) -> None:
    if p.is_meta:
        return
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
