"""Generate synthetic studies: phantoms of heart and abdomen, and label maps of random shapes.

A study is a few patients imaged with one protocol. Its tissues share mean intensities; each patient has
an own anatomy, bias field, noise and blur. Random label maps train the annotator to follow the template,
phantoms to segment thin rings and paired organs. Composites set phantom hearts into real slices, so that
they are found among real tissue. Everything is deterministic in the seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

HEART = {1: "right ventricle cavity", 2: "left ventricle myocardium", 3: "left ventricle cavity"}
CAVITY_NAMES = (
    "lv cavity",
    "left ventricle cavity",
)  # beginnings of class names of which composites can be made
ABDOMEN = {1: "liver", 2: "right kidney", 3: "left kidney", 4: "spleen"}


@dataclass(frozen=True)
class Study:
    """One protocol's patients. images, masks: per slice uint8 (S, S); groups: patient of each slice."""

    classes: dict[int, str]
    images: list[np.ndarray]
    masks: list[np.ndarray]
    groups: list[str]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    return np.meshgrid(axis, axis, indexing="ij")


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Return smooth noise (size, size) of unit scale with about `cells` bumps per side."""
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    field = ndimage.zoom(coarse, (size + 8) / (cells + 3) * 1.0, order=3)
    start = (field.shape[0] - size) // 2
    return field[start : start + size, start : start + size]


def warped_grid(rng: np.random.Generator, size: int, amount: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (y, x) of each pixel, (size, size) in about [-1, 1], bent by smooth noise of `amount`."""
    y, x = _grid(size)
    wave = [smooth_noise(rng, size, 2) * amount + smooth_noise(rng, size, 5) * amount * 0.35 for _ in "yx"]
    return y + wave[0], x + wave[1]


def _ellipse(
    y: np.ndarray, x: np.ndarray, center: tuple[float, float], radii: tuple[float, float], angle: float = 0.0
) -> np.ndarray:
    """Return the elliptic radius of each pixel, below 1 inside."""
    dy, dx = y - center[0], x - center[1]
    u, v = dx * np.cos(angle) + dy * np.sin(angle), -dx * np.sin(angle) + dy * np.cos(angle)
    return np.sqrt((v / radii[0]) ** 2 + (u / radii[1]) ** 2)


def render(
    rng: np.random.Generator, tissue: np.ndarray, means: np.ndarray, texture: np.ndarray
) -> np.ndarray:
    """Turn a tissue map (S, S) int into an image uint8: texture, partial volume, bias, noise."""
    size = tissue.shape[0]
    jittered = means + rng.normal(0, 0.03, means.shape)
    grain = ndimage.gaussian_filter(rng.standard_normal(tissue.shape), rng.uniform(0.6, 1.6))
    image = jittered[tissue] + grain * texture[tissue] * 2.5
    image = ndimage.gaussian_filter(image, rng.uniform(0.4, 1.1) * size / 160)
    image = image * (1 + rng.uniform(0.05, 0.25) * smooth_noise(rng, size, 1))
    noise = rng.uniform(0.01, 0.05)  # Rician, as magnitude images have
    image = np.hypot(image + rng.normal(0, noise, image.shape), rng.normal(0, noise, image.shape))
    low, high = np.percentile(image, [0.5, 99.5])
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1) ** rng.uniform(0.85, 1.2)
    return (scaled * 255).astype(np.uint8)


@dataclass(frozen=True)
class _RightShape:
    """Right ventricle of one patient, in radii of the left one.

    angle: where it lies; reach: distance; width; outflow: size of the outflow tract at the base, and its
    angle beside the ventricle's own
    """

    angle: float
    reach: float
    width: float
    outflow: float
    outflow_angle: float


def _right_ventricle(
    y: np.ndarray, x: np.ndarray, left: tuple[float, float], outer: float, depth: float, shape: _RightShape
) -> np.ndarray:
    """Return the elliptic radius of the right ventricle at a depth in [0, 1] from the base.

    It ends before the apex.
    """
    size = outer * shape.width * np.sqrt(max(1 - (1.02 * depth) ** 2, 0.004)) * (1.15 - 0.15 * depth)
    turn, reach = shape.angle, outer * shape.reach
    spot = (left[0] + np.sin(turn) * reach, left[1] + np.cos(turn) * reach)
    radius = _ellipse(y, x, spot, (size * 1.25, size * 0.85), turn)
    if depth < 0.45:  # near the base the outflow tract joins it
        lobe = size * shape.outflow * (1 - depth / 0.6)
        turn = turn + shape.outflow_angle
        spot = (left[0] + np.sin(turn) * reach * 1.15, left[1] + np.cos(turn) * reach * 1.15)
        radius = np.minimum(radius, _ellipse(y, x, spot, (lobe * 1.1, lobe), turn))
    return radius


def heart_patient(
    rng: np.random.Generator, size: int, slices: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tissue, mask) from base to apex of a short-axis heart.

    tissue ids: 0 air, 1 RV blood, 2 myocardium, 3 LV blood, 4 soft tissue, 5 fat, 6 lung, 7 liver
    """
    zoom = rng.uniform(0.75, 1.25)
    center = (rng.uniform(-0.12, 0.12), rng.uniform(-0.1, 0.15))
    radius = rng.uniform(0.15, 0.23) * zoom
    wall = radius * rng.uniform(0.28, 0.62)
    angle = rng.uniform(-0.5, 0.9) + np.pi  # direction of the right ventricle
    shape = _RightShape(
        angle, rng.uniform(0.95, 1.3), rng.uniform(0.8, 1.25), rng.uniform(0.3, 0.9), rng.uniform(-0.9, 0.9)
    )
    reach_down = rng.uniform(0.75, 0.99)  # depth of the last slice; 1 is the apex
    muscles = rng.uniform(0, 2 * np.pi, int(rng.integers(1, 4)))
    bulk, trabeculae = rng.uniform(0.12, 0.3), rng.uniform(0.0, 0.3)
    eccentric, tilt = rng.uniform(0.88, 1.12), rng.uniform(0, np.pi)
    body = (rng.uniform(0.7, 0.95), rng.uniform(0.85, 1.1))
    y, x = warped_grid(rng, size, rng.uniform(0.015, 0.045))
    ridges = smooth_noise(rng, size, 24)
    for index in range(slices):
        depth = index / max(slices - 1, 1)
        shrink = np.sqrt(max(1 - (reach_down * depth) ** 2.2, 0.03))
        drift = (center[0] + 0.05 * depth * rng.normal(1, 0.2), center[1] + 0.04 * depth)
        tissue = np.zeros((size, size), np.int64)
        outline = _ellipse(y, x, (0.02, 0.0), body)
        tissue[outline < 1] = 5
        tissue[outline < 0.9] = 4
        tissue[_ellipse(y, x, (-0.1, 0.5 + drift[1] * 0.5), (0.5, 0.3)) < 1] = 6
        tissue[_ellipse(y, x, (-0.1, -0.55), (0.5, 0.26)) < 1] = 6
        tissue[_ellipse(y, x, (0.62, -0.3), (0.3, 0.5)) < 1] = 7
        outer = radius * shrink + wall * (1 - 0.35 * depth)
        inner = radius * shrink * (1 - 0.15 * depth)
        sac = _ellipse(y, x, (drift[0], drift[1] - 0.1 * zoom), (outer * 1.45, outer * 1.75))
        tissue[sac < 1] = 5
        lv = _ellipse(y, x, drift, (outer * eccentric, outer / eccentric), tilt)
        rv = _right_ventricle(y, x, drift, outer, depth, shape)
        crescent = (rv < 1) & (lv > 1)
        tissue[(rv < 1.13) & (lv > 1)] = 2  # the thin free wall, not part of the LV myocardium
        tissue[crescent] = 1
        tissue[lv < 1] = 2
        inside = _ellipse(y, x, drift, (inner * eccentric, inner / eccentric), tilt)
        lv_blood = inside < 1
        tissue[lv_blood] = 3
        # Annotations count papillary muscles and trabeculae as cavity, so the visible blood is smaller.
        for turn in muscles:
            spot = (drift[0] + 0.75 * inner * np.sin(turn), drift[1] + 0.75 * inner * np.cos(turn))
            thick = bulk * inner * rng.uniform(0.8, 1.2)
            tissue[(_ellipse(y, x, spot, (thick, thick * 1.3), turn) < 1) & lv_blood] = 2
        rough = 1 - trabeculae * (0.5 + 0.5 * depth) * np.abs(ridges)
        tissue[lv_blood & (inside > rough)] = 2
        tissue[crescent & (rv > rough)] = 2
        mask = np.zeros((size, size), np.uint8)
        mask[crescent] = 1
        mask[lv < 1] = 2
        mask[lv_blood] = 3
        yield tissue, mask


def abdomen_patient(
    rng: np.random.Generator, size: int, slices: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tissue, mask) from top to bottom of an abdomen.

    tissue ids: 0 air, 1 liver, 2 right kidney, 3 left kidney, 4 spleen, 5 fat, 6 muscle, 7 bone,
    8 vessel, 9 bowel
    """
    y, x = warped_grid(rng, size, rng.uniform(0.02, 0.05))
    body = (rng.uniform(0.6, 0.75), rng.uniform(0.82, 0.95))
    organs = {
        1: ((-0.08, -0.42), (0.38, 0.36), 0.3, 0.3, 0.75),
        2: ((0.26, -0.36), (0.15, 0.1), 0.4, 0.62, 0.45),
        3: ((0.24, 0.38), (0.15, 0.1), -0.4, 0.55, 0.48),
        4: ((0.1, 0.56), (0.22, 0.13), -0.5, 0.28, 0.4),
    }
    shape = {
        k: (
            (c[0] + rng.normal(0, 0.03), c[1] + rng.normal(0, 0.03)),
            (r[0] * rng.uniform(0.85, 1.15), r[1] * rng.uniform(0.85, 1.15)),
            a + rng.normal(0, 0.15),
            z + rng.normal(0, 0.04),
            h,
        )
        for k, (c, r, a, z, h) in organs.items()
    }
    bowels = [(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.45), rng.uniform(0.06, 0.14)) for _ in range(7)]
    for index in range(slices):
        level = index / max(slices - 1, 1)
        tissue = np.zeros((size, size), np.int64)
        outline = _ellipse(y, x, (0, 0), body)
        tissue[outline < 1] = 5
        tissue[outline < 0.9] = 6
        tissue[outline < 0.8] = 5
        for cy, cx, r in bowels[: 2 + int(5 * level)]:
            tissue[_ellipse(y, x, (cy, cx), (r, r * 1.3)) < 1] = 9
        mask = np.zeros((size, size), np.uint8)
        for organ, (center, radii, turn, middle, height) in shape.items():
            room = 1 - ((level - middle) / height) ** 2
            if room <= 0.02:
                continue
            scale = np.sqrt(room)
            inside = _ellipse(y, x, center, (radii[0] * scale, radii[1] * scale), turn) < 1
            inside &= (outline < 0.86) & (mask == 0)
            tissue[inside], mask[inside] = organ, organ
            if organ in (2, 3):  # annotations count the renal sinus as kidney
                sinus = _ellipse(y, x, center, (radii[0] * scale * 0.45, radii[1] * scale * 0.35), turn) < 1
                tissue[sinus & inside] = 5
        tissue[_ellipse(y, x, (0.42, 0.0), (0.14, 0.13)) < 1] = 7
        tissue[_ellipse(y, x, (0.22, 0.06), (0.05, 0.05)) < 1] = 8
        yield tissue, mask


_MEANS = {  # (mean intensity per tissue id) of named protocols; studies vary around them
    "cine MR": [0.03, 0.85, 0.32, 0.88, 0.4, 0.75, 0.1, 0.45],
    "late enhancement MR": [0.03, 0.62, 0.15, 0.66, 0.35, 0.85, 0.08, 0.3],
    "MR T2": [0.03, 0.3, 0.75, 0.75, 0.65, 0.45, 0.22, 0.3, 0.15, 0.6],
    "CT": [0.02, 0.62, 0.75, 0.75, 0.6, 0.25, 0.5, 0.95, 0.85, 0.45],
}
_PATIENT: dict[str, Callable[..., Iterator[tuple[np.ndarray, np.ndarray]]]] = {
    "heart": heart_patient,
    "abdomen": abdomen_patient,
}
PROTOCOLS = {"heart": ("cine MR", "late enhancement MR"), "abdomen": ("MR T2", "CT")}
CLASSES = {"heart": HEART, "abdomen": ABDOMEN}


def phantom_study(
    kind: str, rng: np.random.Generator, *, protocol: str | None, patients: int, slices: int, size: int = 160
) -> Study:
    """Draw one study of `kind` "heart" or "abdomen"; protocol None draws random tissue contrasts."""
    base = np.array(_MEANS[protocol or PROTOCOLS[kind][0]])
    means = (
        rng.uniform(0.02, 0.95, base.shape) if protocol is None else base + rng.normal(0, 0.03, base.shape)
    )
    if protocol is None:
        means[3 if kind == "heart" else 0] = means[
            1 if kind == "heart" else 0
        ]  # blood has one intensity in all cavities
        means[0] *= 0.15
    texture = rng.uniform(0.005, 0.05, base.shape)
    study = Study(dict(CLASSES[kind]), [], [], [])
    for patient in range(patients):
        own = means + rng.normal(0, 0.02, means.shape)
        for tissue, mask in _PATIENT[kind](rng, size, slices):
            study.images.append(render(rng, tissue, own, texture))
            study.masks.append(mask)
            study.groups.append(f"{patient:03d}")
    return study


def random_study(rng: np.random.Generator, *, patients: int, size: int = 160) -> Study:
    """Draw a study of random smooth shapes and rings; each patient deforms the same anatomy."""
    regions = int(rng.integers(3, 9))
    fields = [
        smooth_noise(rng, size, int(rng.choice([2, 3, 5])))
        + rng.uniform(0.1, 0.5) * smooth_noise(rng, size, 9)
        for _ in range(regions)
    ]
    base = np.argmax(fields, axis=0)
    objects = [
        (
            (rng.uniform(-0.55, 0.55), rng.uniform(-0.55, 0.55)),
            rng.uniform(0.07, 0.35),
            rng.uniform(0.6, 1.6),
            rng.uniform(0, np.pi),
            rng.uniform(0.45, 0.85) if rng.random() < 0.6 else 0.0,
        )
        for _ in range(int(rng.integers(1, 5)))
    ]
    count = regions + 2 * len(objects)
    means, texture = rng.uniform(0.02, 0.98, count), rng.uniform(0.005, 0.08, count)
    study = Study({i + 1: "structure" for i in range(count - 1)}, [], [], [])
    for patient in range(patients):
        y, x = warped_grid(rng, size, rng.uniform(0.02, 0.08))
        rows, columns = (y + 1) * (size - 1) / 2, (x + 1) * (size - 1) / 2
        tissue = ndimage.map_coordinates(base, [rows, columns], order=0, mode="nearest")
        for index, (center, radius, stretch, turn, hollow) in enumerate(objects):
            spot = (center[0] + rng.normal(0, 0.03), center[1] + rng.normal(0, 0.03))
            size_now = radius * rng.uniform(0.85, 1.15)
            distance = _ellipse(y, x, spot, (size_now * stretch, size_now / stretch), turn)
            tissue[distance < 1] = regions + 2 * index
            tissue[distance < hollow * rng.uniform(0.9, 1.1)] = regions + 2 * index + 1
        study.images.append(render(rng, tissue, means + rng.normal(0, 0.04, count), texture))
        study.masks.append(tissue.astype(np.uint8))
        study.groups.append(f"{patient:03d}")
    return study


def composite_study(
    rng: np.random.Generator, images: np.ndarray, cavities: np.ndarray, groups: list[str]
) -> Study:
    """Set phantom hearts over the left ventricles of real slices.

    images: (N, S, S) uint8; cavities: (N, S, S) bool, the annotated cavity of each; groups: N patients
    A heart gets the place, the size and the intensities of blood, muscle and rim of the real one.
    """
    study = Study(dict(HEART), [], [], list(groups))
    right = rng.uniform(0.8, 1.05)  # blood of the right ventricle relative to the left one
    size = images.shape[-1]
    hearts = {g: list(heart_patient(rng, size, 6)) for g in dict.fromkeys(groups)}
    for image, cavity, group in zip(images, cavities, groups, strict=True):
        slices = [h for h in hearts[group] if (h[1] == 3).any()]
        tissue, mask = _moved_onto(rng, cavity, *slices[int(rng.integers(len(slices)))])
        real = image.astype(np.float32) / 255
        study.images.append(_blend(rng, real, cavity, tissue, right))
        study.masks.append(mask)
    return study


def _moved_onto(
    rng: np.random.Generator, cavity: np.ndarray, tissue: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move a phantom slice so that its left ventricular cavity lies on the real one; 4 is outside of it."""
    ours, theirs = mask == 3, cavity
    ratio = np.sqrt(ours.sum() / theirs.sum()) * rng.uniform(0.8, 1.2)
    turn = rng.normal(0, 0.25)
    matrix = ratio * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    offset = np.array(ndimage.center_of_mass(ours)) - matrix @ np.array(ndimage.center_of_mass(theirs))
    options = {"matrix": matrix, "offset": offset, "order": 0}
    moved = ndimage.affine_transform(tissue, cval=4, **options)
    return moved, ndimage.affine_transform(mask, cval=0, **options)


def _blend(
    rng: np.random.Generator, real: np.ndarray, cavity: np.ndarray, tissue: np.ndarray, right: float
) -> np.ndarray:
    """Paint the heart (tissues 1 to 3) and a rim around it over a real slice (S, S) float in [0, 1]."""
    size = real.shape[0]
    radius = np.sqrt(cavity.sum() / np.pi)
    away = ndimage.distance_transform_edt(~cavity)
    blood = real[cavity].mean()
    near = real[(away > 0.15 * radius) & (away < 0.6 * radius + 2)]
    muscle = min(float(np.percentile(near, rng.uniform(10, 40))), blood * rng.uniform(0.35, 0.75))
    around = real[(away > 0.8 * radius) & (away < 2.5 * radius + 6)]
    low, high = np.percentile(around, [rng.uniform(5, 30), rng.uniform(60, 98)])
    heart = np.isin(tissue, (1, 2, 3))
    rim = ndimage.distance_transform_edt(~heart) < rng.uniform(0.1, 0.7) * radius + 1
    shade = 1 / (1 + np.exp(-3 * smooth_noise(rng, size, 6)))
    painted = np.where(tissue == 1, blood * right, np.where(tissue == 2, muscle, blood))
    painted = np.where(heart, painted, low + (high - low) * shade)
    grain = ndimage.gaussian_filter(rng.standard_normal(real.shape), rng.uniform(0.6, 2.0))
    painted = painted * (1 + rng.uniform(0.02, 0.12) * grain / grain.std())
    painted = painted * (1 + 0.08 * smooth_noise(rng, size, 2))
    painted = ndimage.gaussian_filter(painted, rng.uniform(0.4, 1.0) * size / 160)
    opacity = ndimage.gaussian_filter((heart | rim).astype(np.float32), rng.uniform(0.5, 1.5))
    noise = rng.normal(0, rng.uniform(0.005, 0.025), real.shape) * opacity
    mixed = opacity * painted + (1 - opacity) * real + noise
    return (np.clip(mixed, 0, 1) * 255).astype(np.uint8)
