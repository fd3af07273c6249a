"""Binary sprites by formula, after dSprites (Matthey et al., 2017; Apache-2.0): 64x64, five factors.

Square, ellipse and heart x 6 scales x 40 orientations x 32 x 32 positions. The drawings agree with the original in nine
images of ten, and differ by a pixel or two on the outline in the tenth, so the tasks made of them are tasks of their
own (`mini/sprites_*`), not dSprites.
"""

from __future__ import annotations

import numpy as np

SIZE = 64
FACTORS = (3, 6, 40, 32, 32)  # shapes, scales, orientations, x positions, y positions
_BINS = 16

_SCALES = np.linspace(0.5, 1.0, FACTORS[1])
_ANGLES = np.linspace(0.0, 2.0 * np.pi, FACTORS[2])  # so the first and the last look the same
_CENTRES = np.linspace(16.0, 48.0, FACTORS[3])  # pixels from the left or upper edge
_HALF = 9.6  # half a side of the largest square, in pixels
_STRETCH = 1.33  # the ellipse's half axes are _HALF times and divided by this


def draw(shape: int, scale: int, orientation: int, x: int, y: int) -> np.ndarray:
    """One image from the indices of its five factors → uint8 [64, 64], 0 or 255."""
    pixels = np.arange(SIZE) + 0.5
    right, down = pixels[None, :] - _CENTRES[x], pixels[:, None] - _CENTRES[y]
    cos, sin = np.cos(_ANGLES[orientation]), np.sin(_ANGLES[orientation])
    # The sprite's own axes, in pixels of the largest scale.
    u = (cos * right - sin * down) / _SCALES[scale]
    v = (sin * right + cos * down) / _SCALES[scale]
    # Many pixels lie exactly on an outline; without the last bits of rounding they do so on every machine.
    u, v = u.round(9), v.round(9)
    return np.where((_square, _ellipse, _heart)[shape](u, v), 255, 0).astype(np.uint8)


def sample(number: int, seed: int) -> np.ndarray:
    """`number` different images' factors at random, int64 [number, 5]."""
    # RandomState's stream is frozen for good, Generator's is not.
    chosen = np.random.RandomState(seed).choice(int(np.prod(FACTORS)), number, replace=False)
    return np.stack(np.unravel_index(chosen, FACTORS), axis=1)


def location_labels(factors: np.ndarray) -> np.ndarray:
    """VTAB's dSprites location: the x position in 16 bins. factors: int [n, 5]."""
    return factors[:, 3] * _BINS // FACTORS[3]


def orientation_labels(factors: np.ndarray) -> np.ndarray:
    """VTAB's dSprites orientation in 16 bins. factors: int [n, 5]."""
    return factors[:, 2] * _BINS // FACTORS[2]


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= _HALF


def _ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u / _STRETCH, v * _STRETCH) <= _HALF


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The curve x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, filled.

    x rises up to t = π / 2 and falls after it, so at every x the heart lies between the two t that have this x.
    """
    t = np.arcsin(np.cbrt(np.minimum(np.abs(u) / _HALF, 1.0)))
    above, below = _heart_height(t), _heart_height(np.pi - t)
    return (np.abs(u) <= _HALF) & (above <= v) & (v <= below)


def _heart_height(t: np.ndarray) -> np.ndarray:
    """Pixels downwards from the sprite's centre."""
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return -1.438 - height * _HALF / 14.5
