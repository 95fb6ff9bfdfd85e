"""Check the prompts of a request: shapes, ranges and numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidPrompt, ShapeMismatch


@dataclass(frozen=True, eq=False)
class PromptArrays:
    """Hold the prompts of a request with B images and K classes; None where there are none of a kind.

    boxes: (B, K, 4) float32 XYXY px, four -1 = no box; points: (B, K, P, 2) float32 (x, y) px
    point_labels: (B, K, P) int8, 1 inside, 0 outside, -1 padding
    mask_logits: (B, K, h, w) float over the whole image; mask_present: (B, K) uint8, None = all
    """

    boxes: NDArray[Any] | None = None
    points: NDArray[Any] | None = None
    point_labels: NDArray[Any] | None = None
    mask_logits: NDArray[Any] | None = None
    mask_present: NDArray[Any] | None = None

    def check_shapes(self, items: int, classes: int, max_points: int) -> None:
        """Compare all shapes with B = items and K = classes. Raises ShapeMismatch, InvalidPrompt."""
        for name, array in vars(self).items():
            if array is not None and array.shape[:2] != (items, classes):
                raise ShapeMismatch(
                    f"{name} must begin with (images, classes) = {(items, classes)}, got shape {array.shape}."
                )
        if (self.points is None) != (self.point_labels is None):
            raise InvalidPrompt("points and point_labels belong together. Send both, or none.")
        if self.points is not None and self.point_labels is not None:
            if self.points.shape[:3] != self.point_labels.shape:
                raise ShapeMismatch(
                    f"point_labels must have the shape {self.points.shape[:3]}, got "
                    f"{self.point_labels.shape}."
                )
            if self.points.shape[2] > max_points:
                raise InvalidPrompt(f"A class has at most {max_points} points, got {self.points.shape[2]}.")
        if self.mask_present is not None and self.mask_logits is None:
            raise InvalidPrompt("mask_present came without mask_logits. Send both, or none.")
        if self.mask_logits is not None and 0 in self.mask_logits.shape[2:]:
            raise ShapeMismatch(
                f"mask_logits need a height and a width of 1 or more, got {self.mask_logits.shape[2:]}."
            )

    def item(self, index: int, size: tuple[int, int], names: tuple[str, ...]) -> dict[str, Any]:
        """Return the checked prompts of one image as arguments of `SegmentItem`. Raises InvalidPrompt.

        size: (H, W) of the image; names: the K classes. Coordinates of padding points come back as 0.
        """
        parts = {name: None if array is None else array[index] for name, array in vars(self).items()}
        if (boxes := parts["boxes"]) is not None:
            for name, box in zip(names, boxes, strict=True):
                _check_box(box, size, name, index)
        if (points := parts["points"]) is not None and (labels := parts["point_labels"]) is not None:
            _check_points(points, labels, size, names, index)
            parts["points"] = np.where(labels[..., None] < 0, np.float32(0), points)
        if (logits := parts["mask_logits"]) is not None:
            present = parts["mask_present"]
            parts["mask_logits"] = _check_logits(logits, present, names, index)
        return parts


def _check_box(box: NDArray[Any], size: tuple[int, int], name: str, index: int) -> None:
    if (box == -1).all():
        return
    height, width = size
    x1, y1, x2, y2 = (float(value) for value in box)
    # Written so that NaN fails too.
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise InvalidPrompt(
            f"box of {name!r} of image {index}: expected 0 <= x1 < x2 <= {width} and "
            f"0 <= y1 < y2 <= {height} px, got ({x1:g}, {y1:g}, {x2:g}, {y2:g})",
            item=index,
        )


def _check_points(
    points: NDArray[Any], labels: NDArray[Any], size: tuple[int, int], names: tuple[str, ...], index: int
) -> None:
    height, width = size
    strange = ~np.isin(labels, (-1, 0, 1))
    if strange.any():
        raise InvalidPrompt(
            f"point_labels of image {index}: expected 1, 0 or -1, got {int(labels[strange][0])}", item=index
        )
    within = ((points >= 0) & (points <= np.array([width, height]))).all(axis=-1)  # NaN is not within
    for k, p in np.argwhere(~within & (labels >= 0))[:1]:
        x, y = (float(value) for value in points[k, p])
        raise InvalidPrompt(
            f"point {p} of {names[k]!r} of image {index}: expected 0 <= x <= {width} and "
            f"0 <= y <= {height} px, got ({x:g}, {y:g})",
            item=index,
        )


def _check_logits(
    logits: NDArray[Any], present: NDArray[Any] | None, names: tuple[str, ...], index: int
) -> NDArray[Any]:
    """Return the logits with zeros where they are not present."""
    used = np.ones(len(logits), dtype=bool) if present is None else present != 0
    for k in np.flatnonzero(used):
        bad = int(np.count_nonzero(~np.isfinite(logits[k])))
        if bad:
            raise InvalidPrompt(
                f"mask_logits of {names[k]!r} of image {index}: expected finite numbers, got NaN or "
                f"infinity in {bad} of {logits[k].size} places",
                item=index,
            )
    return logits if used.all() else np.where(used[:, None, None], logits, logits.dtype.type(0))
