"""Reading a user's image file, safely and always as uint8."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vessa.errors import InvalidImage, TooLarge, VessaError

FORMATS = ("PNG", "JPEG", "TIFF")
_MAX_PIXELS = 64 << 20
_MAX_SCANS = 100  # of a JPEG; a progressive one has about ten
_STRIPS, _TILES = 273, 324  # tags of TIFF
_ORIENTATION = 0x0112  # a tag of TIFF and EXIF; 1 is upright


def read_image(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a PNG, JPEG or TIFF file as uint8 (H, W) or (H, W, 3).

    Transparency is dropped, images of more than 8 bits go through `to_bytes`: the pixels are those that the
    annotator makes of the same file. Raises InvalidImage, also for several frames, or TooLarge before
    anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > _MAX_PIXELS:
                raise _too_large(path)
            if has_second_frame(image):
                raise InvalidImage(f"{path} holds several frames; expected one: save the one to be used")
            if is_turned(image):
                raise InvalidImage(f"{path} is a TIFF with an orientation tag; save it upright, without one")
            if image.mode.startswith(("I", "F")):
                return to_bytes(np.asarray(image, dtype=np.float32))
            gray = image.mode in ("1", "L", "LA")
            return np.array(image.convert("L" if gray else "RGB"), dtype=np.uint8)
    except VessaError:
        raise
    except FileNotFoundError as error:
        raise InvalidImage(f"no such file: {path}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path) from error
    except Exception as error:  # decoders fail in many ways on damaged bytes
        raise InvalidImage(f"{path} is not a readable {', '.join(FORMATS)} image") from error


def _too_large(path: Path) -> TooLarge:
    return TooLarge(f"{path} has more than {_MAX_PIXELS} px, the most that are read")


def has_second_frame(image: Image.Image) -> bool:
    """Whether a file holds more than one image; leaves it at the first."""
    # Pillow's `n_frames` would walk through all of them, and a file can claim millions.
    try:
        image.seek(1)
    except EOFError:
        image.seek(0)
        return False
    return True


def has_many_scans(data: bytes, parts: int = 1) -> bool:
    """Whether JPEG data would be decoded for hours: a scan of a few bytes goes over all pixels.

    parts: JPEGs in the data
    """
    return data.count(b"\xff\xda") >= _MAX_SCANS + parts


def jpeg_parts(image: Image.Image) -> int:
    """Return how many JPEGs an image file is made of: the strips or tiles of a TIFF, 0 in another format."""
    if image.format == "JPEG":
        return 1
    if image.format != "TIFF" or image.info.get("compression") not in ("jpeg", "tiff_jpeg"):
        return 0
    tags: Any = getattr(image, "tag_v2", {})
    return max(1, len(tags.get(_STRIPS, ())), len(tags.get(_TILES, ())))


def is_turned(image: Image.Image) -> bool:
    """Whether a TIFF's pixels would not come as they are stored, for Pillow turns them by their tag.

    EXIF rotation of PNG and JPEG is never applied: coordinates are those of the stored pixels.
    """
    return image.format == "TIFF" and image.getexif().get(_ORIENTATION, 1) != 1


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
