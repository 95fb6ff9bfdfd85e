"""Boxes and inner points of masks."""

from typing import Any

import numpy as np
from scipy import ndimage

from vessa.client.types import Floats


def box_of(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, int, int, int] | None:
    """Return the box XYXY px around a mask, bool (H, W); None when it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_and_point(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[Floats, Floats]:
    """Return the box (4,) XYXY px around a mask and the point (2,) (x, y) px deepest inside it.

    mask: bool (H, W). Raises ValueError when it is empty.
    """
    box = box_of(mask)
    if box is None:
        raise ValueError("an empty mask has neither box nor point; expected at least one pixel")
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), mask.shape)
    return np.array(box, np.float32), np.array([x + 0.5, y + 0.5], np.float32)
