"""Scale intensities to the uint8 that networks see and viewers show."""

from typing import Any

import numpy as np

from vessa.errors import InvalidImage


def to_bytes(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale numbers to uint8 so that their `robust_range` becomes 0 to 255.

    Raises InvalidImage for numbers that are not finite.
    """
    return scale_to_bytes(pixels, *robust_range(pixels))


def robust_range(pixels: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the 0.5th and the 99.5th percentile: what a picture without a window shows as 0 and 255.

    Where these are equal, fewer than 1 % of the pixels differ from the rest, and it is the extremes. Raises
    InvalidImage for numbers that are not finite.
    """
    if not np.isfinite(pixels).all():
        raise InvalidImage("the image holds values that are not finite numbers")
    low, high = (float(value) for value in np.percentile(pixels, [0.5, 99.5]))
    if high <= low:
        low, high = float(pixels.min()), float(pixels.max())
    return low, high


def scale_to_bytes(
    pixels: np.ndarray[Any, Any], low: float, high: float
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale numbers to uint8 so that `low` becomes 0 and `high` 255; what is beyond them is cut off."""
    scaled = (pixels - low) / max(high - low, float(np.finfo(np.float32).tiny)) * 255
    result: np.ndarray[Any, np.dtype[np.uint8]] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return result
