"""Studies of random anatomies, and random structures set into real slices."""

import numpy as np
from scipy import ndimage

from vessa_server.pretraining.data.anatomies import draw_anatomy, patient_slices
from vessa_server.pretraining.data.modalities import draw_protocol, image_of
from vessa_server.pretraining.data.synthetic import Study, smooth_noise, warped_grid


def varied_study(rng: np.random.Generator, *, patients: int, slices: int, size: int) -> Study:
    """Draw an anatomy, a modality and `patients` variants of the anatomy seen by it."""
    anatomy = draw_anatomy(rng, size)
    protocol = draw_protocol(rng, anatomy.tissues)
    study = Study(dict(anatomy.names), [], [], [])
    for patient in range(patients):
        for tissue, mask in patient_slices(rng, anatomy, slices):
            study.images.append(image_of(rng, tissue, protocol))
            study.masks.append(mask)
            study.groups.append(f"{patient:03d}")
    return study


def inset_study(rng: np.random.Generator, images: np.ndarray, groups: list[str]) -> Study:
    """Set one to three lesion-like structures into real slices, at another place in each patient.

    images: (N, S, S) uint8; groups: N patients. What a class looks like beside its surroundings (brighter
    or darker, its grain, how sharp its border is) is the same in all slices; shape and place are not.
    """
    count, size = int(rng.integers(1, 4)), images.shape[-1]
    looks = [
        (
            rng.choice([-1, 1]) * rng.uniform(0.12, 0.5),  # contrast
            rng.uniform(0.02, 0.16),  # radius, of the side
            rng.uniform(0.0, 0.12),  # grain
            rng.uniform(0.5, 3.0),  # scale of the grain, px
            rng.uniform(0.4, 2.5) * size / 160,  # softness of the border, px
            rng.uniform(0.0, 0.7),  # share of the local detail that is kept
        )
        for _ in range(count)
    ]
    study = Study(dict.fromkeys(range(1, count + 1), "lesion"), [], [], list(groups))
    for image in images:
        real, mask = image.astype(np.float32) / 255, np.zeros(image.shape, np.uint8)
        bright = np.argwhere(ndimage.uniform_filter(real, 9) > 0.5 * real.mean())
        for class_id, (contrast, radius, grain, scale, soft, kept) in enumerate(looks, 1):
            if rng.random() < 0.08 or not len(bright):
                continue
            row, column = bright[int(rng.integers(len(bright)))]
            y, x = warped_grid(rng, size, 0.35 * radius)
            dy, dx = y - (2 * row / size - 1), x - (2 * column / size - 1)
            r, turn, stretch = (
                2 * radius * rng.uniform(0.6, 1.5),
                rng.uniform(0, np.pi),
                rng.uniform(0.7, 1.4),
            )
            u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
            inside = np.hypot(u / stretch, v * stretch) < r
            if not inside.any():
                continue
            local = float(real[inside].mean())
            noise = ndimage.gaussian_filter(rng.standard_normal(real.shape), scale)
            filled = local + contrast * (1 - local if contrast > 0 else local) * 1.6
            filled = filled + kept * (real - ndimage.gaussian_filter(real, 3))
            filled = filled + grain * noise / (noise.std() + 1e-6) + 0.03 * smooth_noise(rng, size, 4)
            opacity = ndimage.gaussian_filter(inside.astype(np.float32), soft)
            real = opacity * filled + (1 - opacity) * real
            mask[inside] = class_id
        study.images.append((np.clip(real, 0, 1) * 255).astype(np.uint8))
        study.masks.append(mask)
    return study
