"""Random anatomies, and patients as elastic variants of one anatomy.

A study needs structures that look alike in all of its patients, and no two studies should look alike.
An anatomy therefore draws 2 to 20 structures of the kinds that medical images hold: solid organs, walls
around cavities, pairs left and right, tubes, tiny ones, lesions inside other organs and crowds of cells.
Each patient bends, moves and scales the anatomy, and each slice cuts it at another depth.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vessa_server.pretraining.data.synthetic import smooth_noise, warped_grid

MAX_STRUCTURES = 20
KINDS = ("solid", "wall", "pair", "tube", "tiny", "lesion", "cells")
_SHARES = (0.3, 0.16, 0.16, 0.12, 0.1, 0.1, 0.06)
_HARMONICS = 4  # of a contour


@dataclass(frozen=True)
class Structure:
    """One structure in the frame of the anatomy, whose field of view spans [-1, 1].

    center: (y, x); radii: (y, x) before rotation by `angle`; contour: (2, harmonics) cosine and sine
    amplitudes of the radius; inner: share of the radius that the cavity of a wall takes up, 0 for none;
    depth, height: where along z in [0, 1] it lies and how far it reaches; wander: how far its place
    differs between patients; spots: (S, 2) offsets of further copies, of which cells have many;
    classes: class ids of the structure and, for a wall, of its cavity
    """

    kind: str
    center: tuple[float, float]
    radii: tuple[float, float]
    angle: float
    contour: np.ndarray
    inner: float
    depth: float
    height: float
    wander: float
    spots: np.ndarray
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Anatomy:
    """Structures over background tissues.

    background: (S, S) int, tissue ids from 0; body: radii of the body outline, None when the field of
    view lies inside the body; names: class id to name; structures: later ones lie on top
    """

    background: np.ndarray
    body: tuple[float, float] | None
    names: dict[int, str]
    structures: tuple[Structure, ...]

    @property
    def tissues(self) -> int:
        """Number of tissue ids: the air outside the body, the background and one for each class."""
        return 1 + int(self.background.max()) + 1 + len(self.names)


def draw_anatomy(rng: np.random.Generator, size: int) -> Anatomy:
    """Draw an anatomy whose slices have `size` px a side."""
    wanted = int(rng.choice([rng.integers(2, 6), rng.integers(4, 11), rng.integers(9, MAX_STRUCTURES + 1)]))
    structures: list[Structure] = []
    names: dict[int, str] = {}
    while len(names) < wanted:
        kind = str(rng.choice(KINDS, p=_SHARES))
        one = _structure(rng, kind, len(names) + 1, structures, crowd=wanted)
        structures.append(one)
        names |= dict.fromkeys(one.classes, "structure")
        if kind == "pair":
            other = replace(one, center=(one.center[0], -one.center[1]), angle=-one.angle)
            if rng.random() < 0.6:  # each side is a class of its own
                other = replace(other, classes=(len(names) + 1,))
                names |= {one.classes[0]: "left structure", other.classes[0]: "right structure"}
            structures.append(other)
    fields = [
        smooth_noise(rng, size, int(rng.choice([2, 3, 5, 8])))
        + rng.uniform(0.1, 0.5) * smooth_noise(rng, size, 9)
        for _ in range(int(rng.integers(1, 7)))
    ]
    body = (rng.uniform(0.65, 0.98), rng.uniform(0.65, 0.98)) if rng.random() < 0.6 else None
    order = np.argsort([-s.radii[0] * s.radii[1] for s in structures], kind="stable")  # small ones on top
    return Anatomy(np.argmax(fields, axis=0), body, names, tuple(structures[i] for i in order))


def _structure(
    rng: np.random.Generator, kind: str, class_id: int, others: list[Structure], crowd: int
) -> Structure:
    center = (rng.uniform(-0.65, 0.65), rng.uniform(-0.65, 0.65))
    radius = rng.uniform(0.08, 0.34) * (1.0 if crowd < 9 else 0.6)
    stretch, rough, wander, inner = rng.uniform(0.65, 1.5), rng.uniform(0.0, 0.16), 0.03, 0.0
    height = rng.uniform(0.35, 1.2)
    classes: tuple[int, ...] = (class_id,)
    spots = np.zeros((1, 2))
    if kind == "wall":
        inner = rng.uniform(0.5, 0.85)
        rough *= 0.4
        classes = (class_id, class_id + 1) if rng.random() < 0.8 and class_id < MAX_STRUCTURES else classes
    elif kind == "pair":
        center = (center[0], rng.uniform(0.2, 0.6))
        radius *= 0.8
    elif kind == "tube":
        radius, stretch, rough = rng.uniform(0.1, 0.3), rng.uniform(3.0, 7.0), rough * 0.3
    elif kind == "tiny":
        radius = rng.uniform(0.026, 0.06)  # from 0.05 % of the image on
        wander = 0.02
    elif kind == "lesion":
        radius, rough, wander = rng.uniform(0.04, 0.2), rng.uniform(0.1, 0.25), rng.uniform(0.05, 0.4)
        if others and rng.random() < 0.6:
            center = others[int(rng.integers(len(others)))].center
            wander = 0.1
    elif kind == "cells":
        radius, wander = rng.uniform(0.03, 0.09), 0.3
        spots = rng.uniform(-0.7, 0.7, (int(rng.integers(4, 25)), 2))
    return Structure(
        kind,
        center,
        (radius / np.sqrt(stretch), radius * np.sqrt(stretch)),
        rng.uniform(0, np.pi),
        rng.normal(0, 1, (2, _HARMONICS)) * rough / np.arange(1, _HARMONICS + 1),
        inner,
        rng.uniform(0.1, 0.9),
        height,
        wander,
        spots,
        classes,
    )


def patient_slices(
    rng: np.random.Generator, anatomy: Anatomy, slices: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tissue, mask) of one patient from z = 0 to 1.

    tissue: (S, S) int, ids below `anatomy.tissues`; mask: (S, S) uint8 class ids. All slices of a patient
    share its deformation and its field of view.
    """
    size = anatomy.background.shape[0]
    y, x = warped_grid(rng, size, rng.uniform(0.015, 0.07))
    zoom, turn = rng.uniform(0.75, 1.3), rng.normal(0, 0.12)
    shift = rng.normal(0, 0.06, 2)
    y, x = (
        zoom * (y * np.cos(turn) - x * np.sin(turn)) + shift[0],
        zoom * (y * np.sin(turn) + x * np.cos(turn)) + shift[1],
    )
    rows, columns = (np.clip((axis + 1) * (size - 1) / 2, 0, size - 1).round().astype(int) for axis in (y, x))
    ground = anatomy.background[rows, columns] + 1
    if anatomy.body is not None:
        ground[(y / anatomy.body[0]) ** 2 + (x / anatomy.body[1]) ** 2 > 1] = 0
    first = anatomy.tissues - len(anatomy.names) - 1  # the tissue of class k is first + k
    own = [_own(rng, s) for s in anatomy.structures]
    for level in np.linspace(0.0, 1.0, slices) if slices > 1 else (rng.uniform(0.2, 0.8),):
        tissue, mask = ground.copy(), np.zeros((size, size), np.uint8)
        for structure in own:
            room = 1 - ((level - structure.depth) / structure.height) ** 2
            if room <= 0.03:
                continue
            for spot in structure.spots:
                _paint(tissue, mask, y, x, structure, spot, float(np.sqrt(room)), first)
        yield tissue, mask


def _own(rng: np.random.Generator, one: Structure) -> Structure:
    """Return a patient's variant of a structure."""
    scale = rng.uniform(0.82, 1.2) if one.kind != "lesion" else rng.uniform(0.5, 1.6)
    spots = one.spots
    if one.kind == "cells":
        spots = rng.uniform(-0.9, 0.9, (int(rng.integers(3, 25)), 2))
    return replace(
        one,
        center=(one.center[0] + rng.normal(0, one.wander), one.center[1] + rng.normal(0, one.wander)),
        radii=(
            one.radii[0] * scale * rng.uniform(0.92, 1.08),
            one.radii[1] * scale * rng.uniform(0.92, 1.08),
        ),
        angle=one.angle + rng.normal(0, 0.15),
        contour=one.contour + rng.normal(0, 0.02, one.contour.shape),
        inner=one.inner * rng.uniform(0.92, 1.06),
        depth=one.depth + rng.normal(0, 0.04),
        spots=spots,
    )


def _paint(
    tissue: np.ndarray,
    mask: np.ndarray,
    y: np.ndarray,
    x: np.ndarray,
    one: Structure,
    spot: np.ndarray,
    scale: float,
    first: int,
) -> None:
    """Paint one copy of a structure over a slice, in place."""
    dy, dx = y - (one.center[0] + spot[0]), x - (one.center[1] + spot[1])
    reach = 1.6 * scale * max(one.radii)
    near = dy * dy + dx * dx < reach * reach
    if not near.any():
        return
    dy, dx = dy[near], dx[near]
    u, v = dx * np.cos(one.angle) + dy * np.sin(one.angle), dy * np.cos(one.angle) - dx * np.sin(one.angle)
    u, v = u / (scale * one.radii[1]), v / (scale * one.radii[0])
    theta = np.arctan2(v, u)
    radius = np.ones_like(theta)
    for k in range(_HARMONICS):
        radius += one.contour[0, k] * np.cos((k + 1) * theta) + one.contour[1, k] * np.sin((k + 1) * theta)
    distance = np.hypot(u, v) / np.maximum(radius, 0.3)
    ids = np.where(distance < 1, one.classes[0], 0)
    if one.inner:
        # A cavity that is no class of its own shows the tissue that was there.
        ids = np.where(distance < one.inner, one.classes[1] if len(one.classes) > 1 else 0, ids)
    inside = np.zeros_like(near)
    inside[near] = ids > 0
    mask[inside] = ids[ids > 0]
    tissue[inside] = first + ids[ids > 0]
