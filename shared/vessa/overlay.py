"""Draw class colors and contours over images, alike in every picture."""

from typing import Any

import numpy as np


def overlay(
    image: np.ndarray[Any, np.dtype[np.uint8]],
    labels: np.ndarray[Any, np.dtype[np.uint8]],
    opacity: float = 0.45,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Lay class colors and their contours over an image: uint8 (H, W, 3)."""
    canvas = (np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image).astype(np.float32)
    padded = np.pad(labels, 1, mode="edge")
    neighbors = (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1])
    contour = np.any([n != labels for n in neighbors], axis=0)
    for class_id in np.unique(labels[labels > 0]):
        inside = labels == class_id
        color = class_color(int(class_id))
        canvas[inside] = canvas[inside] * (1 - opacity) + color * opacity
        canvas[inside & contour] = color
    return canvas.round().astype(np.uint8)


_COLORS = np.array(
    [[230, 75, 60], [60, 160, 230], [245, 190, 50], [90, 190, 110], [170, 110, 210], [240, 130, 190]],
    np.float32,
)


def class_color(class_id: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """RGB color of a class id, the same in every picture the project draws."""
    color: np.ndarray[Any, np.dtype[np.float32]] = _COLORS[(class_id - 1) % len(_COLORS)]
    return color
