"""Read fields of a request: names, lists, class maps, options and the prompts of a form."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidImage, InvalidPrompt, InvalidRequest, TooLarge, UnknownClass
from vessa_server.serialization.multipart import read_json

CHOICES = ("top1", "top3", "sample")
MAX_TEXT = 128
MIN_SIDE = 3  # px; nothing is seen on less


def read_classes(value: Any) -> dict[int, str]:
    """Check a class map {"1": "right ventricle"}: ids 1 to 254, different names of 1 to 128 characters."""
    wrong = 'classes must be a JSON object of class id (1 to 254) to name, such as {"1": "right ventricle"}'
    if not isinstance(value, dict) or not value:
        raise InvalidRequest(wrong)
    if list(value) == ["255"]:  # a mask of 0 and 255: its only class
        value = {"1": value["255"]}
    classes = {}
    for key, name in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 3 and 1 <= int(key) <= 254):
            raise InvalidRequest(f"{wrong}; got the id {key[:20]!r}")
        classes[int(key)] = read_name(name, "a class name")
    if len(set(classes.values())) != len(classes) or len(classes) != len(value):
        raise InvalidRequest("Each class needs an id and a name of its own.")
    return dict(sorted(classes.items()))


def read_name(value: Any, what: str) -> str:
    """Check a name: 1 to 128 printable characters."""
    if not isinstance(value, str) or not 1 <= len(value.strip()) <= MAX_TEXT or not value.isprintable():
        raise InvalidRequest(f"{what} must be 1 to {MAX_TEXT} printable characters, got {str(value)[:80]!r}")
    return value.strip()


def read_group(value: Any, what: str) -> str:
    """Check the group of a template, which is required."""
    if value in (None, ""):
        raise InvalidRequest("A template needs the field group: whose image it is, such as a patient's id.")
    return read_name(value, what)


def check_known(metadata: Mapping[str, str], known: set[str]) -> None:
    """Refuse unknown metadata: a misspelt name would silently have no effect."""
    unknown = sorted(metadata.keys() - known - {"format"})
    if unknown:
        raise InvalidRequest(
            f"Unknown metadata {unknown[0][:80]!r}. Expected only {', '.join(sorted(known))}."
        )


def json_metadata(metadata: Mapping[str, str], name: str) -> Any:
    """Return a required metadata entry that holds JSON."""
    if name not in metadata:
        raise InvalidRequest(f"The header's metadata needs {name!r}. Add it.")
    return read_json(metadata[name], f"metadata {name!r}")


def read_strings(value: Any, what: str, count: int | None, *, optional: bool = False) -> list[Any]:
    """Check a list of strings (optional: or nulls) of the given length."""
    fits = isinstance(value, list) and all(isinstance(v, str) or (optional and v is None) for v in value)
    if not fits or (count is not None and len(value) != count):
        size = "" if count is None else f"{count} "
        raise InvalidRequest(f"{what} must be a JSON list of {size}strings{' or nulls' if optional else ''}")
    return [None if v is None else read_name(v, what) for v in value]


def read_options(options: Mapping[str, str]) -> tuple[str, int, bool]:
    """Return template_choice, seed and whether probabilities are wanted."""
    choice, seed = options.get("template_choice", "top1"), options.get("seed", "0")
    if choice not in CHOICES:
        raise InvalidRequest(f"template_choice must be one of {', '.join(CHOICES)}, got {choice[:40]!r}")
    if not (seed.isascii() and seed.isdigit() and len(seed) <= 18):
        raise InvalidRequest(f"seed must be a whole number from 0 to 10**18, got {seed[:40]!r}")
    return choice, int(seed), options.get("probabilities", "0") == "1"


def read_switch(options: Mapping[str, str], name: str) -> bool:
    """Return an option that is "1" or "0" (default). Raises InvalidRequest."""
    value = options.get(name, "0")
    if value not in ("0", "1"):
        raise InvalidRequest(f"{name} must be 0 or 1, got {value[:40]!r}")
    return value == "1"


def item_seed(seed: int, image_id: str) -> int:
    """Return the random seed of one image, by its id and not its place: any batch draws the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8], "big")


def read_per_class(
    value: Any,
    classes: Mapping[int, str],
    what: str,
    dtype: Any,
    row: tuple[int | None, ...],
    longest: int = 0,
) -> NDArray[Any] | None:
    """Read prompts given as {class name: prompt} or as a list in the order of the classes, null for none.

    row: shape of one class's prompt, None for a side of up to `longest`. Returns (1, K, *row); rows are
    filled up with -1, which means none for boxes and for point labels.
    """
    if value is None:
        return None
    names = list(classes.values())
    if isinstance(value, dict):
        unknown = sorted(set(value) - set(names))
        if unknown:
            raise UnknownClass(
                f"{what} names the class {unknown[0][:80]!r}, which is not requested: {names}."
            )
        value = [value.get(name) for name in names]
    shape = f"({', '.join('n' if side is None else str(side) for side in row)})"
    wrong = InvalidRequest(f"{what} must hold, for each of {names}, numbers of the shape {shape} or null")
    if not isinstance(value, list) or len(value) != len(names):
        raise wrong
    rows = []
    for one in value:
        try:
            array = (
                np.full([side or 0 for side in row], -1.0)
                if one is None
                else np.asarray(one, dtype=np.float64)
            )
        except (ValueError, TypeError, OverflowError):
            raise wrong from None
        if array.ndim != len(row) or any(w not in (None, s) for w, s in zip(row, array.shape, strict=True)):
            raise wrong
        # Checked here, before the padding: one long row would make all classes' rows as long.
        if any(side is None and size > longest for side, size in zip(row, array.shape, strict=True)):
            raise InvalidPrompt(f"A class has at most {longest} {what}, got {len(array)}.")
        if dtype == np.int8 and not np.isin(array, (-1, 0, 1)).all():
            raise InvalidRequest(f"{what} must be 1 (inside), 0 (outside) or -1 (none)")
        rows.append(array)
    full = [max(array.shape[axis] for array in rows) for axis in range(len(row))]
    padded = np.full((1, len(names), *full), -1, dtype=dtype)
    for index, array in enumerate(rows):
        with np.errstate(over="ignore"):  # what is beyond float32 becomes inf, and is refused as outside
            place: tuple[int | slice, ...] = (0, index, *(slice(side) for side in array.shape))
            padded[place] = array
    return padded


def check_size(size: tuple[int, ...], classes: int, max_pixels: int) -> None:
    """Bound an image of (height, width) px and its requested classes. Raises InvalidImage, TooLarge.

    The model sees a square around the image, and predicts each class on it.
    """
    (height, width), side = size, max(size)
    got = f"got height {height} x width {width}"
    if min(size) < MIN_SIDE:
        raise InvalidImage(f"An image must have sides of {MIN_SIDE} pixels or more, {got}.")
    if not 1 <= height * width <= max_pixels:
        error = TooLarge if height * width else InvalidImage
        raise error(f"An image must have 1 to {max_pixels} pixels, {got}.")
    if side**2 > 4 * max_pixels:
        longest = math.isqrt(4 * max_pixels)
        raise TooLarge(f"An image's longer side has at most {longest} pixels, {got}. Send it in parts.")
    if side**2 * classes > 16 * max_pixels:
        most = 16 * max_pixels // side**2
        raise TooLarge(f"{classes} classes are too many for one request, {got}. Request at most {most}.")
