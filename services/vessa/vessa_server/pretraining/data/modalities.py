"""Draw tissues as imaging methods show them, one function per family of methods.

A modality turns tissue maps of one study into images. Its parameters are drawn once for a study, since
all patients of a study are seen by one protocol; noise, bias field and gain are drawn for each image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from vessa_server.pretraining.data.synthetic import render, smooth_noise


@dataclass(frozen=True)
class Protocol:
    """What a study's images have in common.

    modality: one of `MODALITIES`; means, texture: (tissues,) mean intensity and grain of each tissue id,
    of which 0 is the air outside the body; scale: of grain and speckle in px; window: intensities that
    become black and white
    """

    modality: str
    means: np.ndarray
    texture: np.ndarray
    scale: float
    window: tuple[float, float]


def draw_protocol(rng: np.random.Generator, tissues: int) -> Protocol:
    """Draw the appearance of `tissues` tissue ids."""
    modality = str(rng.choice(list(MODALITIES), p=_SHARES))
    means, texture = rng.uniform(0.05, 0.98, tissues), rng.uniform(0.005, 0.08, tissues)
    window = (0.0, 1.0)
    if modality == "ct":
        means = np.clip(rng.normal(0.5, 0.1, tissues), 0.05, 0.95)  # soft tissues differ little
        bright = rng.random(tissues) < 0.15
        means[bright] = rng.uniform(0.85, 1.5, bright.sum())  # bone and contrast medium
        texture *= 0.3
        half = rng.uniform(0.12, 0.45)
        center = rng.uniform(0.4, 0.6)
        window = (center - half, center + half)
    if rng.random() < 0.8:
        means[0] = rng.uniform(0.0, 0.06)  # air
    return Protocol(modality, means, texture, rng.uniform(0.7, 2.2), window)


def image_of(rng: np.random.Generator, tissue: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Render a tissue map (S, S) int as an image, uint8 (S, S)."""
    return MODALITIES[protocol.modality](rng, tissue, protocol)


def _to_bytes(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return (np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _stretched(image: np.ndarray) -> np.ndarray:
    low, high = np.percentile(image, [0.5, 99.5])
    return _to_bytes(image, float(low), float(high))


def _painted(rng: np.random.Generator, tissue: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Mean intensity of each pixel with a patient's own variation and grain, partial volume included."""
    own = protocol.means + rng.normal(0, 0.02, protocol.means.shape)
    grain = ndimage.gaussian_filter(rng.standard_normal(tissue.shape), protocol.scale)
    image = own[tissue] + grain / (grain.std() + 1e-6) * protocol.texture[tissue]
    return ndimage.gaussian_filter(image, rng.uniform(0.4, 1.2) * tissue.shape[0] / 160)


def _mr(rng: np.random.Generator, tissue: np.ndarray, protocol: Protocol) -> np.ndarray:
    return render(rng, tissue, protocol.means, protocol.texture)


def _ct(rng: np.random.Generator, tissue: np.ndarray, protocol: Protocol) -> np.ndarray:
    image = _painted(rng, tissue, protocol)
    image = image + ndimage.gaussian_filter(rng.standard_normal(tissue.shape), 0.6) * rng.uniform(0.01, 0.06)
    return _to_bytes(image, *protocol.window)


def _ultrasound(rng: np.random.Generator, tissue: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Speckle, bright interfaces, attenuation with depth, shadows and, half of the time, a sector."""
    size = tissue.shape[0]
    image = _painted(rng, tissue, protocol)
    edges = np.abs(ndimage.sobel(ndimage.gaussian_filter(image, 1.0), axis=0))
    image = image + rng.uniform(0.1, 0.8) * edges
    width = protocol.scale * size / 160
    parts = [
        ndimage.gaussian_filter(rng.standard_normal(tissue.shape), (0.6 * width, 1.2 * width)) for _ in "ri"
    ]
    speckle = np.hypot(*parts)
    speckle = (speckle / speckle.mean()) ** rng.uniform(0.4, 1.0)
    rows = np.linspace(0, 1, size)[:, None]
    image = image * speckle * np.exp(-rng.uniform(0.0, 1.2) * rows)
    columns = np.linspace(-1, 1, size)[None, :]
    for _ in range(int(rng.integers(0, 4))):
        middle, half, start = rng.uniform(-0.8, 0.8), rng.uniform(0.03, 0.15), rng.uniform(0.1, 0.6)
        ray = columns - middle * (0.5 + rows)  # shadows spread away from the probe
        shadow = 1 / (1 + np.exp((np.abs(ray) - half) * 40)) / (1 + np.exp((start - rows) * 30))
        image = image * (1 - rng.uniform(0.4, 0.9) * shadow)
    image = np.log1p(rng.uniform(2, 12) * np.maximum(image, 0))
    image = image / (np.percentile(image, 99.5) + 1e-6)
    if rng.random() < 0.5:
        opening, apex = rng.uniform(0.5, 0.9), rng.uniform(-0.5, -0.1)
        distance = np.hypot(rows - apex, columns / 2)
        sector = (np.abs(np.arctan2(columns / 2, rows - apex)) < opening) & (distance < 1 - apex)
        image = image * (sector & (distance > rng.uniform(0.0, 0.2) - apex))
    return _to_bytes(image, 0.0, 1.0)


def _xray(rng: np.random.Generator, tissue: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Sum thicknesses as a projection does: smooth edges, organs seen through others, rib-like stripes."""
    size = tissue.shape[0]
    image = ndimage.gaussian_filter(protocol.means[tissue], rng.uniform(1.0, 3.0) * size / 160)
    image = image + rng.uniform(0.2, 0.7) * smooth_noise(rng, size, 2) * 0.5
    if rng.random() < 0.6:
        rows, columns = np.mgrid[0:size, 0:size] / size
        bend = rng.uniform(0.5, 2.0) * (columns - 0.5) ** 2
        ribs = np.sin(2 * np.pi * (rng.uniform(4, 10) * (rows + bend)) + rng.uniform(0, 6))
        image = image + rng.uniform(0.03, 0.15) * np.maximum(ribs, rng.uniform(0, 0.8))
    image = image + ndimage.gaussian_filter(rng.standard_normal(tissue.shape), 0.7) * rng.uniform(0.005, 0.03)
    return _stretched(image)


def _microscopy(rng: np.random.Generator, tissue: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Stain: clumped texture in every tissue, uneven light, shot noise."""
    size = tissue.shape[0]
    clumps = smooth_noise(rng, size, int(rng.integers(20, 45)))
    image = _painted(rng, tissue, protocol) * (1 + rng.uniform(0.05, 0.3) * clumps)
    image = np.maximum(image * (1 + rng.uniform(0, 0.2) * smooth_noise(rng, size, 1)), 0)
    count = rng.uniform(30, 300)
    return _stretched(rng.poisson(image * count) / count)


Renderer = Callable[[np.random.Generator, np.ndarray, Protocol], np.ndarray]
MODALITIES: dict[str, Renderer] = {
    "mr": _mr,
    "ct": _ct,
    "ultrasound": _ultrasound,
    "x-ray": _xray,
    "microscopy": _microscopy,
}
_SHARES = (0.4, 0.2, 0.2, 0.1, 0.1)
