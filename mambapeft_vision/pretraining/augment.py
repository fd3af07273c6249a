"""Augmentation of a batch on its device, one draw for each image; nothing waits for the device.

Every function takes and returns float images [b, 3, H, W] in 0 to 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_vision.data.augment import LUMINANCE
from mambapeft_vision.pretraining.config import AugmentConfig, SourceConfig


def augment(images: Tensor, source: SourceConfig, common: AugmentConfig) -> Tensor:
    """Random crop, rotation, mirroring, colour, inversion and erasing."""
    images = warp(images, source.flip, common)
    images = recolour(images, source.grey, source.invert, common.jitter)
    return erase(images, common.erase)


def warp(images: Tensor, flip: float, common: AugmentConfig) -> Tensor:
    """A random crop, rotated and perhaps mirrored, brought back to full size in one bilinear resampling."""
    b, device = len(images), images.device
    area = _uniform(b, common.min_area, 1.0, device)
    aspect = torch.exp(_uniform(b, -math.log(common.max_aspect), math.log(common.max_aspect), device))
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    x, y = (1 - width) * _uniform(b, -1, 1, device), (1 - height) * _uniform(b, -1, 1, device)
    angle = _uniform(b, -math.radians(common.degrees), math.radians(common.degrees), device)
    mirror = 1.0 - 2.0 * _chance(b, flip, device)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack(
        (
            torch.stack((width * cos * mirror, -height * sin, x), dim=1),
            torch.stack((width * sin * mirror, height * cos, y), dim=1),
        ),
        dim=1,
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def recolour(images: Tensor, grey: float, invert: float, jitter: float) -> Tensor:
    """Random saturation (none at all with probability `grey`), contrast, brightness, and inversion."""
    b, device = len(images), images.device
    saturation = _uniform(b, 1 - jitter, 1 + jitter, device) * (1 - _chance(b, grey, device))
    contrast, brightness = _uniform(b, 1 - jitter, 1 + jitter, device), _uniform(b, 1 - jitter, 1 + jitter, device)
    # Plain numbers: copying a tensor of weights to the device would wait for it.
    luminance = sum(weight * channel for weight, channel in zip(LUMINANCE, images.split(1, dim=1), strict=True))
    images = torch.lerp(luminance, images, _each(saturation))
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, _each(contrast))
    images = (images * _each(brightness)).clamp(0, 1)
    return torch.lerp(images, 1 - images, _each(_chance(b, invert, device)))


def erase(images: Tensor, probability: float) -> Tensor:
    """Sets a rectangle of 2 to 20 % of the image to its mean colour, with the given probability."""
    b, _, rows, columns = images.shape
    device = images.device
    area, aspect = _uniform(b, 0.02, 0.2, device), torch.exp(_uniform(b, -0.7, 0.7, device))
    height, width = (area * aspect).sqrt(), (area / aspect).sqrt()
    top, left = torch.rand(b, device=device) * (1 - height), torch.rand(b, device=device) * (1 - width)
    y = ((torch.arange(rows, device=device) + 0.5) / rows).view(1, 1, rows, 1)
    x = ((torch.arange(columns, device=device) + 0.5) / columns).view(1, 1, 1, columns)
    inside = (y > _each(top)) & (y < _each(top + height)) & (x > _each(left)) & (x < _each(left + width))
    inside = inside & (_each(_chance(b, probability, device)) > 0)
    return torch.where(inside, images.mean((2, 3), keepdim=True), images)


def _uniform(count: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(count, device=device).uniform_(low, high)


def _chance(count: int, probability: float, device: torch.device) -> Tensor:
    """1.0 with the given probability, else 0.0."""
    return (torch.rand(count, device=device) < probability).float()


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
