"""Turn what a person draws in a viewer into prompts of slices."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidPrompt
from vessa_server.serialization.prompt_arrays import PromptArrays

Bool = NDArray[np.bool_]
_INSIDE = 6.0  # mask logit of a drawn region, and its negative outside


@dataclass(frozen=True, eq=False)
class Drawing:
    """Hold what was drawn on one slice.

    axis, index: the slice; points: (P, 3) int rows of row, column, label 1 inside or 0 outside
    box: (top, left, bottom, right), half open; region: bool (H, W) of a lasso
    include: False for a box or region that the structure must not enter
    """

    axis: int
    index: int
    points: NDArray[np.int32] | None = None
    box: tuple[int, int, int, int] | None = None
    region: Bool | None = None
    include: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(a.nbytes for a in (self.points, self.region) if a is not None)


def point(place: Sequence[Any], include: bool, axis: int, shape: tuple[int, int, int]) -> Drawing:
    """Return a click. place: voxel indices along three axes. Raises InvalidPrompt outside the volume."""
    where = [_whole(value, n, "point") for value, n in zip(_three(place, "point"), shape, strict=True)]
    row, column = (value for a, value in enumerate(where) if a != axis)
    return Drawing(axis, where[axis], np.array([[row, column, int(include)]], np.int32))


def box(bounds: Sequence[Any], include: bool, axis: int, shape: tuple[int, int, int]) -> list[Drawing]:
    """Return a box, (low, high) along each axis, half open, as one drawing of each of its slices.

    It lies in the plane of its axis of size 1; a box over several slices is cut along `axis`.
    """
    pairs = [_pair(one, n) for one, n in zip(_three(bounds, "box"), shape, strict=True)]
    axis = _plane([high - low for low, high in pairs], axis)
    (top, bottom), (left, right) = (pair for a, pair in enumerate(pairs) if a != axis)
    return [
        Drawing(axis, index, box=(top, left, bottom, right), include=include) for index in range(*pairs[axis])
    ]


def scribble(mask: Bool, corner: Sequence[int], include: bool, axis: int, most: int) -> list[Drawing]:
    """Return a scribble as points on each slice that it crosses.

    mask: (a, b, c), whose voxel (0, 0, 0) is at `corner`; most: points that are kept of a slice
    """
    found = []
    for plane, index, flat, (top, left) in _slices(mask, corner, axis):
        places = np.argwhere(flat)
        if len(places) > most:
            places = places[np.linspace(0, len(places) - 1, most).astype(int)]
        rows = np.column_stack([places + [top, left], np.full(len(places), int(include))])
        found.append(Drawing(plane, index, rows.astype(np.int32)))
    return found


def lasso(
    mask: Bool, corner: Sequence[int], include: bool, axis: int, shape: tuple[int, int, int]
) -> list[Drawing]:
    """Return a lasso as a region of each slice that it crosses; see `scribble`."""
    found = []
    for plane, index, flat, (top, left) in _slices(mask, corner, axis):
        size = [n for a, n in enumerate(shape) if a != plane]
        region = np.zeros(size, bool)
        region[top : top + flat.shape[0], left : left + flat.shape[1]] = flat
        found.append(Drawing(plane, index, region=region, include=include))
    return found


def prompts_of(
    drawings: Iterable[Drawing], size: tuple[int, int], known: Bool | None, most: int
) -> tuple[PromptArrays, Bool]:
    """Return the prompts (1 image, 1 class) of one slice and where the structure must not be, bool (H, W).

    known: bool (H, W) of an initial label; most: points at most. Boxes and lassos together bound the
    structure, unless a click inside is outside of them.
    """
    points: list[NDArray[np.int32]] = []
    boxes: list[tuple[int, int, int, int]] = []
    region = None if known is None else known.copy()
    excluded = np.zeros(size, bool)
    for one in drawings:
        if one.points is not None:
            points.append(one.points)
        if one.box is not None and one.include:
            boxes.append(one.box)
        elif one.box is not None:
            top, left, bottom, right = one.box
            excluded[top:bottom, left:right] = True
        if one.region is not None and one.include:
            region = one.region.copy() if region is None else region | one.region
            boxes.append(_around(one.region))
        elif one.region is not None:
            excluded |= one.region
    rows = np.concatenate(points) if points else np.zeros((0, 3), np.int32)
    if len(rows) > most:  # the newest clicks count, a long scribble is thinned
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    return PromptArrays(**_arrays(rows, boxes, region)), excluded


def _arrays(
    rows: NDArray[np.int32], boxes: list[tuple[int, int, int, int]], region: Bool | None
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if len(rows):
        centers = rows[:, [1, 0]].astype(np.float32) + np.float32(0.5)
        given |= {"points": centers[None, None], "point_labels": rows[:, 2].astype(np.int8)[None, None]}
    if boxes:
        edges = np.array(boxes)
        (top, left), (bottom, right) = edges[:, :2].min(0), edges[:, 2:].max(0)
        inside = rows[rows[:, 2] == 1]
        within = (inside[:, 0] >= top) & (inside[:, 0] < bottom) & (inside[:, 1] >= left)
        if (within & (inside[:, 1] < right)).all():
            given["boxes"] = np.array([left, top, right, bottom], np.float32)[None, None]
    if region is not None and region.any():
        logits = np.where(region, np.float16(_INSIDE), np.float16(-_INSIDE))
        given["mask_logits"] = logits[None, None]
    return given


def _slices(mask: Bool, corner: Sequence[int], axis: int) -> Iterable[tuple[int, int, Bool, tuple[int, int]]]:
    """Yield axis, index, mask (h, w) and its corner of each slice that a drawn mask crosses."""
    crossed = [np.flatnonzero(mask.any(tuple(b for b in range(3) if b != a))) for a in range(3)]
    if not crossed[0].size:
        raise InvalidPrompt("The drawing is empty. Draw at least one voxel.")
    axis = _plane([int(places[-1] - places[0]) + 1 for places in crossed], axis)
    top, left = (corner[a] for a in range(3) if a != axis)
    for place in crossed[axis].tolist():
        flat: Bool = mask.take([place], axis).squeeze(axis)
        yield axis, corner[axis] + place, flat, (top, left)


def _plane(extent: Sequence[int], axis: int) -> int:
    """Return the axis of the slice that something flat lies in; `axis` where several would do, or none."""
    return axis if extent[axis] == 1 or 1 not in extent else list(extent).index(1)


def _around(region: Bool) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _three(values: Any, what: str) -> Sequence[Any]:
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise InvalidPrompt(f"A {what} needs one entry for each of the three axes.")
    return values


def _whole(value: Any, count: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < count:
        raise InvalidPrompt(f"A {what} must lie inside the volume: 0 to {count - 1}, got {str(value)[:20]}.")
    return int(value)


def _pair(value: Any, count: int) -> tuple[int, int]:
    """Return (low, high) cut to the volume. Raises InvalidPrompt when nothing is left."""
    numbers = isinstance(value, list | tuple) and len(value) == 2
    if not numbers or not all(isinstance(v, int | float) and abs(v) < 1e9 for v in value):
        raise InvalidPrompt("A box needs two numbers for each axis: [[low, high], ...].")
    low, high = max(0, int(min(value))), min(count, int(max(value)))
    if low >= high:
        raise InvalidPrompt(f"The box lies outside of the volume, whose axis has {count} voxels.")
    return low, high
