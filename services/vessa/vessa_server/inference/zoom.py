"""Where to look closer.

A structure that fills a tenth of an image is a few positions wide to the networks. So the annotator
looks twice: at the whole image, and then at the square around what it has found, where the same
networks see it several times larger. Templates are looked at in the same two ways. What the first look
has found also tells how large each class is, and so which templates are alike in that.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from vessa.mask_geometry import box_of
from vessa_server.model.geometry import Square, Window
from vessa_server.types import SegmentItem

MARGIN = 1.5  # side of the window over the longer side of what it shows
LEAST = 0.2  # of the whole square's side: a speck is not looked at any closer
SPECK = 0.1  # of the largest piece's area
FILLED = 0.8  # of the whole square's side: what takes up more has been seen well enough

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in px of the image


def window_around(box: Box | None, height: int, width: int) -> Window | None:
    """Return the window to look at closer in an image of height x width px; None to leave it at the whole."""
    if box is None:
        return None
    whole = max(height, width)
    x0, y0, x1, y1 = box
    side = round(max(MARGIN * max(x1 - x0, y1 - y0), LEAST * whole))
    if side > FILLED * whole:
        return None
    return Window(round((y0 + y1 - side) / 2), round((x0 + x1 - side) / 2), side)


def union(boxes: Iterable[Box | None]) -> Box | None:
    """Return the box around boxes; None when there is none."""
    there = np.array([b for b in boxes if b is not None])
    if not len(there):
        return None
    low, high = there[:, :2].min(0), there[:, 2:].max(0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


@dataclass(frozen=True)
class Found:
    """What a first look has found. box: around it; areas: px of the image that each class id takes up."""

    box: Box | None
    areas: dict[int, float]

    def layout(self, window: Window) -> dict[int, float] | None:
        """Return the root of each class's share of a window, as `Template.layout`; None when all is empty."""
        if self.box is None:
            return None
        return {key: math.sqrt(area) / window.side for key, area in self.areas.items()}


NOTHING = Found(None, {})


def find(logits: Tensor, class_ids: Sequence[int], square: Square) -> Found:
    """Read a first look.

    logits: (K, 1, s, s) on the square, of the classes in `class_ids`. Pieces of a class that are small
    beside its largest one do not widen the box.
    """
    fused = torch.cat([torch.zeros_like(logits[:1]), logits])[:, 0].argmax(0).cpu().numpy()
    scale, shown = square.side / logits.shape[-1], square.shown
    boxes, areas = [], {}
    for row, class_id in enumerate(class_ids, 1):
        pieces, count = ndimage.label(fused == row)
        areas[class_id] = 0.0
        if count:
            sizes = np.bincount(pieces.ravel())[1:]
            areas[class_id] = float(sizes.sum()) * scale**2
            boxes.append(box_of(np.isin(pieces, 1 + np.flatnonzero(sizes >= SPECK * sizes.max()))))
    box = union(boxes)
    if box is None:
        return Found(None, areas)
    x0, y0, x1, y1 = (scale * v for v in box)
    return Found((x0 + shown.left, y0 + shown.top, x1 + shown.left, y1 + shown.top), areas)


def prompted_box(item: SegmentItem, height: int, width: int) -> tuple[Box | None, bool]:
    """Return the box around all that an item's prompts point at in its image of height x width px.

    Also returns whether they tell the extent of every class that is asked for, by a box or a mask: then
    there is nothing more to find.
    """
    boxes: list[Box | None] = []
    extents: list[Box | None] = []
    if item.boxes is not None:
        extents += [None if (b == -1).all() else tuple(b.tolist()) for b in item.boxes]
    if item.mask_logits is not None:
        rows, columns = item.mask_logits.shape[-2:]
        scale = np.array([width / columns, height / rows] * 2)
        for index, logits in enumerate(item.mask_logits):
            there = item.mask_present is None or item.mask_present[index]
            box = box_of(logits > 0) if there else None
            box = None if box is None else tuple((np.array(box) * scale).tolist())
            if item.boxes is None:
                extents.append(box)
            else:
                extents[index] = union([extents[index], box])
    if item.points is not None and item.point_labels is not None:
        inside = item.points[item.point_labels == 1]
        boxes += [(float(x), float(y), float(x), float(y)) for x, y in inside]
    return union([*boxes, *extents]), bool(extents) and None not in extents
