"""Compares the logits of a written model with those of the model itself."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.timm_model import TimmModel

TOLERANCE = 1e-3  # as a part of the largest logit; other orders of summation stay far below


def images(model: AdaptedModel, batch: int = 2) -> Tensor:
    """Normalised images [batch, C, H, W] of the model's size, drawn from the batch."""
    backbone = cast(TimmModel, model.backbone)
    size = backbone.in_chans, *backbone.patch_embed.img_size
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def difference(model: AdaptedModel, other: Callable[[Tensor], Tensor], batches: Iterable[int] = (2,)) -> float:
    """The largest difference of logits as a part of the largest logit, over `batches`; NaN where one is NaN."""
    found = []
    for batch in batches:
        inputs = images(model, batch)
        expected = model(inputs)
        found.append((other(inputs) - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return float(torch.stack(found).max())
