"""Read masks: one rule for files in a folder and for those sent over HTTP.

A mask is a PNG file whose stored values are class ids: gray of 1, 2, 4, 8 or 16 bits, or palette indexes.
Two exceptions exist, both explicit in the description of the classes: with exactly one class, a mask of the
values 0 and 255 shows this class; a value map (`values` of meta.json) translates the stored values.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vessa.errors import InvalidImage, ShapeMismatch, TooLarge, UnknownClass, VessaError
from vessa.file_kinds import kind_of

IGNORE = 255  # the stored id of pixels that are neither trained on nor scored
IGNORE_NAME = "ignore"
LARGEST_ID = 254
_ROUNDING = 0.01  # of ids stored as floats or rescaled
Labels = np.ndarray[Any, np.dtype[np.uint8]]
# Names that people give to id 0.
_BACKGROUND = re.compile(
    r"back|^(bg|unlabell?ed|unannotated|unknown|none|nothing|void|empty|outside|others?|rest|0"
    r"|(no|not|non|clear)[ _-].*)$",
    re.IGNORECASE,
)
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def decode_mask(
    data: bytes,
    max_pixels: int,
    what: str = "the mask",
    *,
    formats: tuple[str, ...] = ("PNG",),
    size: tuple[int, int] | None = None,
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the stored values of a mask, int32 (H, W).

    formats: others than PNG only where a value map says what their values mean; size: (H, W) of the image.
    Raises InvalidImage (no such file, color, several frames), TooLarge, ShapeMismatch.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise TooLarge(
                    f"{what} has {image.height} x {image.width} pixels, over the limit {max_pixels}"
                )
            if size is not None and (image.height, image.width) != size:
                raise ShapeMismatch(
                    f"{what} must have the image's size (height, width) {size}, got "
                    f"{(image.height, image.width)}"
                )
            if image.format == "PNG" and getattr(image, "is_animated", False):
                raise InvalidImage(f"{what} holds several frames; expected one")
            if image.mode not in {"1", "L", "P", "I", "I;16"}:
                raise InvalidImage(
                    f"{what} has color or transparency ({image.mode}); expected one channel of class ids. "
                    "Save it as 8-bit gray, or with a palette whose indexes are the ids"
                )
            values = np.array(image).astype(np.int32)
            # Pillow spreads gray PNGs of 2 and 4 bits over 0..255; ids must come back as they were stored.
            depth = data[24] if image.format == "PNG" and image.mode == "L" else 8
    except VessaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"{what} has more than {max_pixels} pixels") from None
    except Exception:  # decoders fail in many ways on damaged bytes
        kind = kind_of(data)
        raise InvalidImage(
            f"{what} must be a {' or '.join(formats)} file; got "
            + (
                "one that is damaged or cut off"
                if kind in formats
                else f"a {kind} file"
                if kind
                else "another kind"
            )
        ) from None
    return values // (255 // (2**depth - 1)) if depth in {2, 4} else values


def read_classes(stated: Mapping[int, str]) -> dict[int, str]:
    """Return the classes by id, without background 0.

    A single class stated with the value 255 of its masks has the id 1. Raises UnknownClass for other ids that
    are not 1 to 254, and for an id 0 that is named like a structure: its pixels would be background unsaid.
    """
    check_background(stated)
    classes = {key: name for key, name in stated.items() if key != 0}
    if list(classes) == [IGNORE]:
        return {1: classes[IGNORE]}
    wrong = sorted(key for key in classes if not 1 <= key <= LARGEST_ID)
    if wrong:
        raise UnknownClass(f"class ids must be 1 to {LARGEST_ID}, got {wrong[:5]}. Renumber them")
    return dict(sorted(classes.items()))


def check_background(stated: Mapping[int, str]) -> None:
    """Raise UnknownClass when id 0, which is always the background, has the name of something else."""
    name = str(stated.get(0, "")).strip()
    if name and not _BACKGROUND.search(name):
        raise UnknownClass(
            f"class id 0 is called '{name}', but 0 is always the background. Number the classes from 1, in "
            "the masks too, or call it 'background'"
        )


def read_value_map(stated: Mapping[str, Any], classes: Mapping[int, str]) -> dict[int, int]:
    """Return stored value -> class id of a map such as {"255": "lesion", "1-20": "background"}.

    stated: value, or first-last, to a class name, "background" or "ignore". Raises UnknownClass.
    """
    ids = {name: key for key, name in classes.items()} | {"background": 0, IGNORE_NAME: IGNORE}
    found: dict[int, int] = {0: 0}
    for text, name in stated.items():
        match = _RANGE.fullmatch(text)
        if match is None or name not in ids:
            raise UnknownClass(
                f"`values` must map a stored value or first-last to a class name, got {text!r}: "
                f"{name!r}; the "
                f"names are {sorted(ids)}"
            )
        first = int(match[1])
        found |= dict.fromkeys(range(first, int(match[2] or first) + 1), ids[name])
    return found


def class_ids(
    values: np.ndarray[Any, Any],
    classes: Mapping[int, str],
    value_map: Mapping[int, int] | None = None,
    what: str = "the mask",
) -> Labels:
    """Turn stored values into class ids, uint8 of the same shape; 255 marks pixels to ignore.

    values: integers or floats; value_map: stored value -> id. Raises UnknownClass that names the values in
    the file which are no id: those over 254, negative, fractional or outside the map.
    """
    present = np.unique(values)
    fractional = present[np.abs(present - np.rint(present)) > _ROUNDING]
    if fractional.size:
        shown = [round(float(v), 4) for v in fractional[:5]]
        raise UnknownClass(
            f"{what} holds fractional values {shown}; class ids are whole numbers. It was probably resampled "
            "by linear interpolation: use nearest neighbor"
        )
    stored = sorted({int(v) for v in np.rint(present)})
    if value_map is not None:
        known: Mapping[int, int] = value_map
    elif len(classes) == 1 and stored[-1] == IGNORE and set(stored) <= {0, IGNORE}:
        known = {0: 0, IGNORE: next(iter(classes))}
    else:
        known = {v: v for v in range(LARGEST_ID + 1)}
    wrong = [v for v in stored if v not in known]
    if wrong:
        named = f"; the classes are {dict(classes)}" if classes else ""
        raise UnknownClass(
            f"{what} holds the values {wrong[:5]}, which are no class ids (1 to "
            f"{LARGEST_ID}){named}. Correct the "
            "mask; in a data folder, `values` of meta.json can map its values"
        )
    result = np.zeros(values.shape, np.uint8)
    for value in stored:
        if known[value]:
            result[np.abs(values - value) < 0.5] = known[value]
    return result
