"""dSprites (Matthey et al., 2017; Apache-2.0) drawn by formula: binary sprites, 64x64, five factors.

Square, ellipse and heart x 6 scales x 40 orientations x 32 x 32 positions. The rule was found by comparing with the
published file: each sprite is a polygon, moved in single precision as OpenGL does, its corners rounded to 1/256 pixel;
a pixel is lit where its centre is inside, or on a left or lower edge. One of 10,000 random images came out different,
by one pixel; all that `mini/sprites_*` have are equal (tests/data/generated/test_mini.py).
"""

import numpy as np

SIZE = 64
FACTORS = (3, 6, 40, 32, 32)  # shapes, scales, orientations, x positions, y positions
_BINS = 16
_GRID = 256  # steps a pixel

_SCALES = np.linspace(0.5, 1.0, FACTORS[1])
_ANGLES = np.linspace(0.0, 2.0 * np.pi, FACTORS[2])  # so the first and the last look the same
_CENTRES = np.linspace(16.0, 48.0, FACTORS[3])  # pixels from the left or upper edge
_HALF = 9.6  # half a side of the largest square, in pixels


def draw(shape: int, scale: int, orientation: int, x: int, y: int) -> np.ndarray:
    """One image from the indices of its five factors → uint8 [64, 64], 0 or 255."""
    right, down = _CORNERS[shape]
    angle = np.float64(np.float32(_ANGLES[orientation]))
    cos, sin = (np.float32(f(angle)) * np.float32(_SCALES[scale]) for f in (np.cos, np.sin))
    return fill(
        _on_grid(sin, down, cos, right, _CENTRES[x]),
        _on_grid(-sin, right, cos, down, _CENTRES[y]),
    )


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


def _square() -> np.ndarray:
    return _HALF * np.array([(-1.0, 1.0, 1.0, -1.0), (-1.0, -1.0, 1.0, 1.0)])


def _ellipse() -> np.ndarray:
    t = 2 * np.pi * np.arange(100) / 100
    return _HALF * np.stack([1.33 * np.cos(t), np.sin(t) / 1.33])


def heart() -> np.ndarray:
    """The corners of dSprites' heart [150, 2]."""
    t = 2 * np.pi * np.arange(150) / 150
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return _HALF * np.stack([np.sin(t) ** 3, -0.15 - height / 14.5])


# float32 [2, corners]: pixels right of and below the centre, at the largest scale.
_CORNERS = tuple(corners.astype(np.float32) for corners in (_square(), _ellipse(), heart()))


def _on_grid(a: np.float32, u: np.ndarray, b: np.float32, v: np.ndarray, centre: float) -> np.ndarray:
    """a u + b v + centre in whole grid steps, through coordinates from -1 to 1 in single precision."""
    half = np.float32(SIZE / 2)
    place = (a / half) * u + ((b / half) * v + (np.float32(centre) / half - np.float32(1)))
    return np.rint(_GRID * np.float64(place * half + half)).astype(np.int64)


def fill(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The polygon with these corners, in whole grid steps, so that nothing is rounded → uint8 [64, 64], 0 or 255."""
    x0, y0, x1, y1 = x, y, np.roll(x, -1), np.roll(y, -1)
    x0, x1 = np.where(y0 > y1, x1, x0), np.where(y0 > y1, x0, x1)
    y0, y1 = np.minimum(y0, y1), np.maximum(y0, y1)
    centres = _GRID * np.arange(SIZE) + _GRID // 2
    edge, row = np.nonzero((y0[:, None] < centres) & (centres <= y1[:, None]))
    # Where an edge crosses the middle of a row, inside and outside change from the first centre at or right of it.
    run, rise = (x1 - x0)[edge], (y1 - y0)[edge]
    crossing = x0[edge] - (run * (y0[edge] - centres[row])) // rise  # rounded up
    column = -((_GRID // 2 - crossing) // _GRID)  # again
    changes = np.zeros((SIZE, SIZE + 1), dtype=np.int64)
    np.add.at(changes, (row, np.clip(column, 0, SIZE)), 1)
    return (255 * (changes.cumsum(axis=1)[:, :SIZE] % 2)).astype(np.uint8)
