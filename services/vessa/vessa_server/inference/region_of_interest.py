"""Region of interest: the square window in which an image is segmented a second time (beyond the paper).

A structure that fills a tenth of an image is only a few positions wide to the networks. So the annotator
segments twice: the whole image, then the window around what the first pass or the prompts located, in which
the same networks see the structure several times larger. Templates are encoded in the same two ways.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from vessa.masks.geometry import box_of
from vessa_server.inference.image_views import Box, ImageView, ViewEncoder
from vessa_server.inference.query import Query
from vessa_server.model.geometry import Window
from vessa_server.types import SegmentItem

MARGIN = 1.5  # side of the window over the longer side of its box
MIN_SIDE = 0.2  # of the whole square's side: a speck is not magnified further
MAX_SIDE = 0.8  # of the whole square's side: a larger region is large enough in the whole image


def zoom(queries: Sequence[Query], encoder: ViewEncoder) -> None:
    """Set the zoomed view of each query that has a region of interest; equal windows are encoded once.

    The region is around the prompts and, unless these cover every class, around the first pass.
    """
    windows: list[Window | None] = []
    views: dict[tuple[str, Window], ImageView] = {}
    missing: dict[tuple[str, Window], ImageView] = {}
    for query in queries:
        item, whole = query.item, query.whole
        size = whole.image.shape[:2]
        box, covers_all = prompted_box(item, *size)
        if not covers_all and query.first_pass is not None:
            box = union([query.first_pass.box, box])
        windows.append(window := window_around(box, *size))
        if window is not None and window in whole.zoomed:
            views[item.image_id, window] = whole.zoomed[window]
        elif window is not None:
            missing[item.image_id, window] = whole
    squares = [replace(whole.square, window=window) for (_, window), whole in missing.items()]
    fresh = encoder.encode([whole.image for whole in missing.values()], squares)
    for ((image_id, window), whole), view in zip(missing.items(), fresh, strict=True):
        views[image_id, window] = view
        whole.add_zoomed(window, view)
    for query, window in zip(queries, windows, strict=True):
        if window is not None:
            query.zoomed = views[query.item.image_id, window]
            query.whole.conditioned.clear()  # only the first pass needed them


def window_around(box: Box | None, height: int, width: int) -> Window | None:
    """Return the window around a box in an image of height x width px; None to use the whole image."""
    if box is None:
        return None
    whole = max(height, width)
    x0, y0, x1, y1 = box
    side = round(max(MARGIN * max(x1 - x0, y1 - y0), MIN_SIDE * whole))
    if side > MAX_SIDE * whole:
        return None
    return Window(round((y0 + y1 - side) / 2), round((x0 + x1 - side) / 2), side)


def union(boxes: Iterable[Box | None]) -> Box | None:
    """Return the box around all boxes; None when there is none."""
    there = np.array([b for b in boxes if b is not None])
    if not len(there):
        return None
    low, high = there[:, :2].min(0), there[:, 2:].max(0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def prompted_box(item: SegmentItem, height: int, width: int) -> tuple[Box | None, bool]:
    """Return the box around all prompts of an item in its image of height x width px.

    Also returns whether every requested class has a box or mask prompt. Then the prompts alone give the
    region of interest, and the first pass is not needed.
    """
    boxes: list[Box | None] = []
    extents: list[Box | None] = []
    if item.boxes is not None:
        extents += [None if (b == -1).all() else tuple(b.tolist()) for b in item.boxes]
    if item.mask_logits is not None:
        rows, columns = item.mask_logits.shape[-2:]
        scale = np.array([width / columns, height / rows] * 2)
        for index, logits in enumerate(item.mask_logits):
            present = item.mask_present is None or item.mask_present[index]
            box = _box_of_logits(logits, scale) if present else None
            if item.boxes is None:
                extents.append(box)
            else:
                extents[index] = union([extents[index], box])
    if item.points is not None and item.point_labels is not None:
        inside = item.points[item.point_labels == 1]
        boxes += [(float(x), float(y), float(x), float(y)) for x, y in inside]
    return union([*boxes, *extents]), bool(extents) and None not in extents


def _box_of_logits(logits: np.ndarray, scale: np.ndarray) -> Box | None:
    """Return the box of the positive logits (h, w), times `scale` (4,)."""
    box = box_of(logits > 0)
    if box is None:
        return None
    x0, y0, x1, y1 = (np.array(box) * scale).tolist()
    return x0, y0, x1, y1
