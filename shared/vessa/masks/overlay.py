"""Draw class colors and contours over images, the same in every picture."""

from typing import Any

import numpy as np

from vessa.masks.colors import OPACITY, class_color

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def overlay(image: Pixels, labels: Pixels, contour: int = 1) -> Pixels:
    """Draw the classes of a label map over an image; returns uint8 (H, W, 3).

    image: uint8 (H, W[, 3])
    labels: uint8 (H, W) class ids, 0 is background
    contour: width of the contours inside each class, px
    """
    canvas = (np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image).astype(np.float32)
    edge = _inner_edge(labels, contour)
    for class_id in np.unique(labels[labels > 0]):
        inside = labels == class_id
        color = np.array(class_color(int(class_id)), np.float32)
        canvas[inside] = canvas[inside] * (1 - OPACITY) + color * OPACITY
        canvas[inside & edge] = color
    return canvas.round().astype(np.uint8)


def _inner_edge(labels: Pixels, width: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return bool (H, W): pixels with another class within `width` px in their row or column."""
    padded = np.pad(labels, width, mode="edge")
    height, length = labels.shape
    edge = np.zeros(labels.shape, bool)
    for shift in range(2 * width + 1):
        edge |= padded[shift : shift + height, width : width + length] != labels
        edge |= padded[width : width + height, shift : shift + length] != labels
    return edge
