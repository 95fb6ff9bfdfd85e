"""Write the demo's data set: synthetic sagittal knee MR of patients whom Stage 1 has never seen.

    python examples/knees.py FOLDER [--patients 28] [--slices 6] [--size 128] [--seed 0]

Stage 1 learns from phantoms of hearts, abdomens and random shapes. A demo on these would flatter the
annotator: it would know the test images' generator. Organ, contrast and image formation differ here, and no
code is shared. Every second patient was scanned by another sequence, and the labeled patient shows one of
them. Bones are solids in three dimensions, cut by slices. The image is formed in k-space: coil sensitivity,
phase, a limited matrix (Gibbs ringing), complex noise, and ghosts of a patient who moved.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = {1: "femur", 2: "tibia"}  # the kneecap is too small for a demo of minutes
# Mean signal by sequence. Proton density with fat suppression: marrow and fat are dark, fluid is bright. T1:
# the reverse.
SEQUENCES = {
    "pd": {
        "air": 0.02,
        "fat": 0.26,
        "muscle": 0.52,
        "femur": 0.3,
        "tibia": 0.33,
        "patella": 0.3,
        "cartilage": 0.74,
        "fluid": 0.97,
        "tendon": 0.07,
        "vessel": 0.85,
    },
    "t1": {
        "air": 0.02,
        "fat": 0.95,
        "muscle": 0.4,
        "femur": 0.82,
        "tibia": 0.8,
        "patella": 0.82,
        "cartilage": 0.5,
        "fluid": 0.3,
        "tendon": 0.07,
        "vessel": 0.15,
    },
}
Field = np.ndarray


def waves(rng: np.random.Generator, points: Field, amount: float, cycles: float) -> Field:
    """Return a smooth random field at points (..., 3), a sum of plane waves of up to `cycles` per unit."""
    total = np.zeros(points.shape[:-1])
    for _ in range(6):
        direction = rng.normal(size=3)
        direction *= rng.uniform(0.3, 1) * cycles / np.linalg.norm(direction)
        total += np.sin(2 * np.pi * (points @ direction + rng.uniform()))
    return amount * total / 6


def capsule(points: Field, start: Field, end: Field, radius: float) -> Field:
    """Return the signed distance to a rod with round ends."""
    along = end - start
    share = np.clip((points - start) @ along / (along @ along), 0, 1)
    return np.linalg.norm(points - start - share[..., None] * along, axis=-1) - radius


def ellipsoid(points: Field, center: Field, radii: Field) -> Field:
    """Return the approximate signed distance to an ellipsoid."""
    return (np.linalg.norm((points - center) / radii, axis=-1) - 1) * radii.min()


def blend(first: Field, second: Field, width: float = 0.08) -> Field:
    """Join two solids smoothly."""
    share = np.clip(0.5 + 0.5 * (second - first) / width, 0, 1)
    return second + (first - second) * share - width * share * (1 - share)


def knee(rng: np.random.Generator, points: Field) -> dict[str, Field]:
    """Return signed distances of a patient's tissues at points (..., 3): (z, y, x), y down, x to the front.

    Later entries lie on top of earlier ones.
    """
    points = points / rng.uniform(0.85, 1.15)
    bend = np.stack([waves(rng, points, 0.06, 0.8) for _ in range(3)], -1)
    points = points + bend + rng.normal(0, 0.04, 3)
    tilt, flexion = rng.normal(0, 0.06), rng.normal(0, 0.1)
    joint = np.array([0.0, 0.05, -0.05])
    shaft = joint + np.array([0.0, -1.3, -0.1 + tilt])
    thick = rng.uniform(0.17, 0.22)
    femur = capsule(points, joint + [0, -0.35, 0.02], shaft, thick)
    for side in (-1, 1):
        center = joint + [side * rng.uniform(0.36, 0.44), -0.2, -0.04 + rng.normal(0, 0.02)]
        radii = np.array([0.3, rng.uniform(0.22, 0.27), rng.uniform(0.3, 0.36)])
        femur = blend(femur, ellipsoid(points, center, radii))
    femur = blend(femur, ellipsoid(points, joint + [0, -0.3, 0.12], np.array([0.5, 0.2, 0.2])))
    plateau = ellipsoid(points, joint + [0, 0.24, -0.04], np.array([0.72, 0.17, rng.uniform(0.34, 0.4)]))
    below = joint + [0, 1.3, -0.05 + flexion]
    tibia = blend(plateau, capsule(points, joint + [0, 0.35, 0.02], below, thick * 0.9), 0.2)
    tubercle = ellipsoid(points, joint + [0, 0.5, 0.22], np.array([0.2, 0.14, 0.1]))
    tibia = blend(tibia, tubercle)
    height = rng.uniform(-0.42, -0.28)
    front = joint + [rng.normal(0, 0.05), height, rng.uniform(0.46, 0.52)]
    patella = ellipsoid(points, front, np.array([0.42, rng.uniform(0.17, 0.22), rng.uniform(0.085, 0.11)]))
    tendon = capsule(points, front + [0, 0.2, 0.02], joint + [0, 0.55, 0.33], 0.05)
    quadriceps = capsule(points, front + [0, -0.2, -0.02], joint + [0, -1.3, 0.4], 0.06)
    leg = np.linalg.norm(points[..., [0, 2]] / [1.25, rng.uniform(0.72, 0.82)], axis=-1) - 1
    muscles = blend(
        capsule(points, joint + [0, -0.5, -0.45], joint + [0, -1.4, -0.4], 0.24),
        capsule(points, joint + [0, 0.45, -0.4], joint + [0, 1.4, -0.35], 0.24),
    )
    fluid = blend(
        ellipsoid(points, joint + [0, -0.55, 0.34], np.array([0.4, rng.uniform(0.1, 0.24), 0.06])),
        ellipsoid(points, joint + [0, 0.02, -0.36], np.array([0.5, 0.12, rng.uniform(0.04, 0.1)])),
    )
    return {
        "fat": leg,
        "muscle": np.minimum(muscles, capsule(points, joint + [0, -0.6, 0.3], joint + [0, -1.4, 0.3], 0.13)),
        "fluid": fluid,
        "cartilage": np.minimum(femur - 0.05, np.minimum(tibia - 0.035, patella - 0.04)),
        "tendon": np.minimum(np.minimum(tendon, quadriceps), shell(femur, tibia, patella)),
        "vessel": capsule(points, joint + [0.1, -1.4, -0.42], joint + [0.0, 1.4, -0.4], 0.035),
        "femur": femur,
        "tibia": tibia,
        "patella": patella,
    }


def shell(*bones: Field) -> Field:
    """Return the cortical bone: a dark rim around the marrow, thinner than most pixels at the joint."""
    return np.minimum.reduce([np.abs(bone) - 0.012 for bone in bones])


def scan(
    rng: np.random.Generator, tissues: dict[str, Field], points: Field, pixel: float, sequence: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return one slice's image and mask, uint8 (S, S) each. pixel: its side in the units of the points."""
    means = SEQUENCES[sequence]
    signal = np.full(points.shape[:-1], means["air"])
    mask = np.zeros(points.shape[:-1], np.uint8)
    ids = {name: class_id for class_id, name in CLASSES.items()}
    for name, distance in tissues.items():
        share = 1 / (1 + np.exp(np.clip(distance / (0.4 * pixel), -30, 30)))  # partial volume
        grain = 1 + rng.normal(0, 0.02) + waves(rng, points, 0.12, 9.0)
        signal = signal * (1 - share) + means[name] * grain * share
        mask[distance < 0] = ids.get(name, 0)
    return form_image(rng, signal, points), mask


def form_image(rng: np.random.Generator, signal: Field, points: Field) -> np.ndarray:
    """Measure a slice's signal as a scanner does, and return it as uint8."""
    coil = np.array([0.0, rng.uniform(-0.2, 0.2), rng.choice([-1.3, 1.3])])
    reach = ((points - coil) ** 2).sum(-1)
    sensitivity = 0.35 + 1 / (1 + 0.6 * reach)
    phase = np.exp(1j * waves(rng, points, 2.0, 0.6))
    lines = np.fft.fftshift(np.fft.fft2(signal * sensitivity * phase))
    size = len(signal)
    row = np.abs(np.arange(size) - size // 2)
    kept = row <= rng.uniform(0.6, 0.85) * size / 2  # fewer phase-encoding lines than pixels
    if rng.random() < 0.4:  # the patient moved: lines of one part were measured at another place
        moved = (row > 0.1 * size) & (np.arange(size) % int(rng.integers(3, 6)) == 0)
        lines = lines * np.exp(2j * np.pi * moved * rng.normal(0, 0.12))[:, None]
    lines = lines * kept[:, None]
    noise = rng.uniform(0.03, 0.07) * size * np.sqrt(kept.mean())
    lines += noise * (rng.normal(size=lines.shape) + 1j * rng.normal(size=lines.shape)) * kept[:, None]
    image = np.abs(np.fft.ifft2(np.fft.ifftshift(lines)))
    low, high = np.percentile(image, [1, 99.5])
    return (np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def patient(
    rng: np.random.Generator, slices: int, size: int, sequence: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return images and masks of one patient, from one side of the knee to the other."""
    seed = int(rng.integers(2**32))
    axis = np.linspace(-1, 1, size)
    found = []
    for z in np.linspace(-0.62, 0.62, slices):
        points = np.stack(np.meshgrid([z], axis, axis, indexing="ij"), -1)[0]
        anatomy = np.random.default_rng(seed)  # every slice cuts the same solid
        found.append(scan(rng, knee(anatomy, points), points, 2 / size, sequence))
    return found


def write_knees(folder: Path, *, patients: int, slices: int, size: int, seed: int) -> None:
    """Write a data set of pictures with masks, class names and splits."""
    for part in ("images", "masks", "splits"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"knee{number:03d}" for number in range(patients)]
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, number])
        sequence = "pd" if number % 2 == 0 else "t1"
        for place, (image, mask) in enumerate(patient(rng, slices, size, sequence), 1):
            Image.fromarray(image).save(folder / "images" / f"{name}_{place:02d}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{name}_{place:02d}.png")
    order = np.random.default_rng(seed).permutation(names).tolist()
    validation, test = max(1, patients // 10), max(1, patients // 4)
    train = order[validation + test :]
    splits = {"val": order[:validation], "test": order[validation : validation + test]}
    splits |= {"train": train, "labeled_1": train[:1]}
    for part, groups in splits.items():
        (folder / "splits" / f"{part}.txt").write_text("".join(f"{g}\n" for g in sorted(groups)))
    meta: dict[str, Any] = {
        "classes": {"0": "background", **{str(i): name for i, name in CLASSES.items()}},
        "modality": "synthetic MR of the knee, two sequences",
        "licence": "Apache-2.0, synthetic: made by examples/knees.py",
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    for option, default in (("patients", 28), ("slices", 6), ("size", 128), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = vars(parser.parse_args())
    write_knees(options.pop("folder"), **options)
