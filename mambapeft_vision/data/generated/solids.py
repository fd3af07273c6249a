"""Rendered scenes of solids on a plane, after CLEVR: how many are there, and how far is the nearest?

A small ray caster: spheres, cubes and cylinders in eight colours and two sizes, one light, shadows on the ground. The
images depend on the seed alone.
"""

from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 96, 64
FEWEST, MOST = 3, 10  # solids in a scene: 8 classes
# Distance from the camera to the centre of the nearest solid: 6 classes of about equal size.
DISTANCE_EDGES = (5.1, 5.25, 5.4, 5.65, 6.0)

_COLOURS = (
    np.array(
        [
            (87, 87, 87),
            (173, 35, 35),
            (42, 75, 215),
            (29, 105, 20),
            (129, 74, 25),
            (129, 38, 192),
            (41, 208, 208),
            (255, 238, 51),
        ]
    )
    / 255.0
)
_SIZES = (0.35, 0.6)  # radius, or half a side
_REACH = 2.6  # solids stand at most this far from the middle, along each axis
_GAP = 0.15  # and at least this far apart
_CAMERA = np.array([0.0, -6.5, 3.4])
_TARGET = np.array([0.0, 0.0, 0.2])
_LIGHT = np.array([-0.5, -0.6, 0.75]) / np.linalg.norm([-0.5, -0.6, 0.75])
_FIELD = 0.58  # tangent of half the horizontal angle of view
_AMBIENT, _DIFFUSE, _GROUND = 0.35, 0.65, 0.62


@dataclass(frozen=True)
class Solid:
    """kind: sphere, cube or cylinder; size: radius or half a side; x, y: where it stands; angle: turned by (cube)."""

    kind: str
    size: float
    x: float
    y: float
    angle: float
    colour: int

    @property
    def centre(self) -> np.ndarray:
        return np.array([self.x, self.y, self.size])


def sample(number: int, seed: int) -> list[list[Solid]]:
    """`number` scenes at random; each count of solids is equally likely."""
    random = np.random.RandomState(seed)  # its stream is frozen for good
    return [_scene(random) for _ in range(number)]


def count_label(scene: list[Solid]) -> int:
    """The class of a scene by its number of solids."""
    return len(scene) - FEWEST


def distance_label(scene: list[Solid]) -> int:
    """The class of a scene by the distance of the nearest solid."""
    nearest = min(float(np.linalg.norm(solid.centre - _CAMERA)) for solid in scene)
    return int(np.searchsorted(DISTANCE_EDGES, nearest))


def render(scene: list[Solid]) -> np.ndarray:
    """uint8 [64, 96, 3]."""
    origin, rays = _CAMERA, _rays()
    depth = np.where(rays[:, 2] < 0, -origin[2] / np.minimum(rays[:, 2], -1e-9), np.inf)
    ground = np.isfinite(depth)
    colour = np.full((len(rays), 3), 0.8)  # the sky, where the ground ends
    points = origin + np.where(ground, depth, 0.0)[:, None] * rays
    light = np.full(len(rays), _AMBIENT + _DIFFUSE * _LIGHT[2])
    for solid in scene:
        reached, _ = _hit(solid, points, _LIGHT)
        light[np.isfinite(reached)] = _AMBIENT
    # The ground fades into the sky.
    fade = np.exp(-np.where(ground, depth, 0.0) / 25.0)[:, None]
    colour[ground] = (fade * _GROUND * light[:, None] * 1.2 + (1 - fade) * 0.8)[ground]
    for solid in scene:
        reached, normal = _hit(solid, origin, rays)
        nearer = reached < depth
        shade = _AMBIENT + _DIFFUSE * np.maximum(normal @ _LIGHT, 0.0)
        colour[nearer] = (shade[:, None] * _COLOURS[solid.colour])[nearer]
        depth = np.where(nearer, reached, depth)
    return np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8).reshape(HEIGHT, WIDTH, 3)


def _scene(random: np.random.RandomState) -> list[Solid]:
    count = random.randint(FEWEST, MOST + 1)
    solids: list[Solid] = []
    while len(solids) < count:
        kind = ("sphere", "cube", "cylinder")[random.randint(3)]
        size, colour = _SIZES[random.randint(2)], random.randint(len(_COLOURS))
        x, y = random.uniform(-_REACH, _REACH, 2)
        solid = Solid(kind, size, x, y, random.uniform(0, np.pi / 2), colour)
        if all(np.hypot(x - o.x, y - o.y) > _extent(solid) + _extent(o) + _GAP for o in solids):
            solids.append(solid)
    return solids


def _extent(solid: Solid) -> float:
    """Radius of the circle on the ground that holds the solid."""
    return solid.size * (np.sqrt(2) if solid.kind == "cube" else 1.0)


def _rays() -> np.ndarray:
    """Directions of the camera's rays, unit vectors [pixels, 3], row by row."""
    forward = (_TARGET - _CAMERA) / np.linalg.norm(_TARGET - _CAMERA)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    x = ((np.arange(WIDTH) + 0.5) / WIDTH * 2 - 1) * _FIELD
    y = (1 - (np.arange(HEIGHT) + 0.5) / HEIGHT * 2) * _FIELD * HEIGHT / WIDTH
    rays = forward + x[None, :, None] * right + y[:, None, None] * up
    return (rays / np.linalg.norm(rays, axis=2, keepdims=True)).reshape(-1, 3)


def _hit(solid: Solid, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays first enter a solid: distances [n] (infinite for a miss) and outward normals [n, 3].

    origin, rays: [3] or [n, 3].
    """
    origin, rays = np.broadcast_arrays(origin - solid.centre, rays)
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.kind == "sphere":
            enter, leave = _between_roots(np.sum(rays * rays, 1), np.sum(origin * rays, 1), origin, 3, solid.size)
            distance = _entered(enter, leave)
            normal = origin + np.where(np.isfinite(distance), distance, 0.0)[:, None] * rays
        elif solid.kind == "cylinder":
            flat = rays[:, :2]
            side = _between_roots(np.sum(flat * flat, 1), np.sum(origin[:, :2] * flat, 1), origin, 2, solid.size)
            caps = _slab(origin[:, 2], rays[:, 2], solid.size)
            distance = _entered(np.maximum(side[0], caps[0]), np.minimum(side[1], caps[1]))
            normal = origin + np.where(np.isfinite(distance), distance, 0.0)[:, None] * rays
            on_cap = (caps[0] > side[0])[:, None]
            normal = np.where(on_cap, [0.0, 0.0, 1.0], normal * [1.0, 1.0, 0.0])
        else:
            cos, sin = np.cos(solid.angle), np.sin(solid.angle)
            turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
            own_origin, own_rays = origin @ turn.T, rays @ turn.T
            slabs = [_slab(own_origin[:, i], own_rays[:, i], solid.size) for i in range(3)]
            enters = np.stack([slab[0] for slab in slabs], 1)
            distance = _entered(enters.max(1), np.min([slab[1] for slab in slabs], axis=0))
            face = enters.argmax(1)
            normal = np.zeros_like(own_rays)
            rows = np.arange(len(face))
            normal[rows, face] = -np.sign(own_rays[rows, face])
            normal = normal @ turn
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return distance, normal / np.maximum(length, 1e-12)


def _between_roots(
    a: np.ndarray, half_b: np.ndarray, origin: np.ndarray, dimensions: int, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Distances at which rays enter and leave a round body: the roots of a t² + 2 half_b t + c; NaN for a miss."""
    c = np.sum(origin[:, :dimensions] ** 2, 1) - radius**2
    root = np.sqrt(half_b**2 - a * c)
    return (-half_b - root) / a, (-half_b + root) / a


def _slab(origin: np.ndarray, rays: np.ndarray, half: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances at which rays enter and leave the space between two planes at ± half."""
    one, other = (-half - origin) / rays, (half - origin) / rays
    return np.minimum(one, other), np.maximum(one, other)


def _entered(enter: np.ndarray, leave: np.ndarray) -> np.ndarray:
    """The entering distance where there is one ahead, else infinity (NaN compares as no)."""
    return np.where((enter <= leave) & (enter > 1e-6), enter, np.inf)
