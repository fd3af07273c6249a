"""Random changes of training images on their device, one draw for each image; off unless a config asks for them.

The changes of an image depend only on seed, epoch and its place in the epoch. The draws are made on the CPU, so that a
resumed run, another device or another number of ranks sees the same.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_vision.utils.errors import UserError

_LONGEST_SIDES = 4 / 3  # largest ratio of a crop's sides
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augment:
    """The random changes of training images.

    Args:
        flip: probability of mirroring left and right.
        crop: smallest share of the area that a random crop keeps, which is resized to the whole; 1 crops nothing.
        colour: brightness, contrast and (of RGB) saturation are multiplied by 1 - colour to 1 + colour.
    """

    flip: float = 0.0
    crop: float = 1.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        wrong = [
            f"{key}={value}"
            for key, value, fits in (
                ("flip", self.flip, 0 <= self.flip <= 1),
                ("crop", self.crop, 0 < self.crop <= 1),
                ("colour", self.colour, 0 <= self.colour < 1),
            )
            if not fits
        ]
        if wrong:
            raise UserError(
                f"dataset.augment: {', '.join(wrong)}; expected flip in 0 to 1, crop above 0 and at most 1, colour "
                f"from 0 and below 1. Correct it, or set dataset.augment=null."
            )

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """uint8 images [b, C, H, W] and their row of `draws`, [b, 8] in 0 to 1 → uint8 images of the same shape."""
        if not len(images):  # a rank's part of a very small batch
            return images
        draws = draws.to(images.device)
        changed = images.float() / 255
        if self.flip or self.crop < 1:
            changed = self._warped(changed, draws)
        if self.colour:
            changed = self._recoloured(changed, draws[:, 5:])
        return (changed * 255).round().clamp(0, 255).byte()

    def _warped(self, images: Tensor, draws: Tensor) -> Tensor:
        """A crop, perhaps mirrored, brought back to full size in one bilinear resampling."""
        area = self.crop + (1 - self.crop) * draws[:, 0]
        free = 1.0 if self.crop < 1 else 0.0  # without a crop the sides keep their proportion
        aspect = torch.exp(free * math.log(_LONGEST_SIDES) * (2 * draws[:, 1] - 1))
        width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
        x, y = (1 - width) * (2 * draws[:, 2] - 1), (1 - height) * (2 * draws[:, 3] - 1)
        mirror = 1.0 - 2.0 * (draws[:, 4] < self.flip).float()
        none = torch.zeros_like(width)
        rows = torch.stack((width * mirror, none, x), dim=1), torch.stack((none, height, y), dim=1)
        grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _recoloured(self, images: Tensor, draws: Tensor) -> Tensor:
        factors = 1 + self.colour * (2 * draws - 1)
        saturation, contrast, brightness = (factors[:, k].view(-1, 1, 1, 1) for k in range(3))
        if images.shape[1] == 3:
            weighted = zip(LUMINANCE, images.split(1, dim=1), strict=True)
            images = torch.lerp(sum(weight * channel for weight, channel in weighted), images, saturation)
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
        return images * brightness


def draws_of(num_images: int, seed: int, epoch: int, batch: int) -> Tensor:
    """The draws of a batch's images: float32 [num_images, 8] in 0 to 1, on the CPU."""
    digest = hashlib.sha256(f"augmentation, seed {seed}, epoch {epoch}, batch {batch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(num_images, 8, generator=generator)
