"""Reading a user's image file, safely and always as uint8."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vessa.errors import InvalidImage, TooLarge

FORMATS = ("PNG", "JPEG", "TIFF")
_MAX_PIXELS = 64 << 20


def read_image(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a PNG, JPEG or TIFF file as uint8 (H, W) or (H, W, 3).

    Images of more than 8 bits are clipped to their 0.5 and 99.5 percentiles. Raises InvalidImage,
    or TooLarge before anything is decoded.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise TooLarge(
                    f"{path} has {image.width} x {image.height} px; at most {_MAX_PIXELS} px are read"
                )
            if image.mode in ("L", "1"):
                return np.array(image.convert("L"), dtype=np.uint8)
            if image.mode.startswith(("I", "F")):
                return to_bytes(np.asarray(image, dtype=np.float32))
            return np.array(image.convert("RGB"), dtype=np.uint8)
    except FileNotFoundError as error:
        raise InvalidImage(f"no such file: {path}") from error
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InvalidImage(f"{path} is not a readable {', '.join(FORMATS)} image") from error


def to_bytes(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale any numbers to uint8 by their 0.5 and 99.5 percentiles."""
    low, high = np.percentile(pixels, [0.5, 99.5])
    scaled = np.clip((pixels - low) / max(float(high - low), 1e-9), 0, 1) * 255
    result: np.ndarray[Any, np.dtype[np.uint8]] = scaled.round().astype(np.uint8)
    return result


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
