"""Compute Dice, IoU and HD95 of volumes, with explicit rules for empty masks.

Both masks empty: not scored, but counted. One mask empty: Dice and IoU are 0 and HD95 is the diagonal of
the volume, so that a missed structure never gets a perfect score.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Labels = np.ndarray[Any, np.dtype[np.uint8]]
Distances = np.ndarray[Any, np.dtype[np.float64]]
Spacing = tuple[float, float, float]

METRICS = ("dice", "iou", "iou_fgbg", "hd95")


def dice(pred: Mask, truth: Mask) -> float | None:
    """Compute Dice of two bool arrays of one shape, in [0, 1]; None when both are empty."""
    _check(pred, truth)
    total = int(pred.sum()) + int(truth.sum())
    return None if total == 0 else 2 * int((pred & truth).sum()) / total


def iou(pred: Mask, truth: Mask) -> float | None:
    """Compute intersection over union of the foreground, in [0, 1]; None when both are empty."""
    _check(pred, truth)
    union = int((pred | truth).sum())
    return None if union == 0 else int((pred & truth).sum()) / union


def iou_fgbg(pred: Mask, truth: Mask) -> float | None:
    """Compute the mean IoU of foreground and background (tables of the paper); None when both are empty."""
    _check(pred, truth)
    foreground, background = iou(pred, truth), iou(~pred, ~truth)
    if foreground is None:
        return None
    return (foreground + (1.0 if background is None else background)) / 2


def hd95(pred: Mask, truth: Mask, spacing: Spacing | None = None) -> float | None:
    """Compute the 95th percentile of the symmetric surface distances of two bool volumes.

    As in MedPy, which the published ACDC tables use, the percentile is taken over both directions
    together. MONAI takes the larger percentile of the two directions, which is never smaller. A single
    slice (D = 1) is measured in its plane.

    pred, truth: bool (D, H, W)
    spacing: (z, y, x) mm, None for voxels
    Returns None when both are empty, and the diagonal of the volume when one is empty.
    """
    _check(pred, truth)
    step = _step(pred, spacing)
    if pred.shape[0] == 1:  # no neighbors in z: its surface is its contour
        pred, truth, step = pred[0], truth[0], step[1:]
    if not pred.any() and not truth.any():
        return None
    if not pred.any() or not truth.any():
        return float(np.linalg.norm(np.array(pred.shape) * np.array(step)))
    return float(np.percentile(np.concatenate(_distances(pred, truth, step)), 95))


def surface_distances(pred: Mask, truth: Mask, spacing: Spacing | None = None) -> tuple[Distances, Distances]:
    """Compute the distance of each surface voxel of one volume from the surface of the other.

    pred, truth: bool (D, H, W), neither empty; spacing: (z, y, x) mm, None for voxels.
    Returns the distances of pred's surface voxels and those of truth's, float64 (N,) each.
    """
    _check(pred, truth)
    if not pred.any() or not truth.any():
        raise ValueError("An empty volume has no surface: expected two volumes with foreground.")
    return _distances(pred, truth, _step(pred, spacing))


def _distances(pred: Mask, truth: Mask, step: tuple[float, ...]) -> tuple[Distances, Distances]:
    pred, truth = _cropped(pred, truth)
    surface_pred, surface_truth = _surface(pred), _surface(truth)
    to_truth = ndimage.distance_transform_edt(~surface_truth, sampling=step)[surface_pred]
    to_pred = ndimage.distance_transform_edt(~surface_pred, sampling=step)[surface_truth]
    return to_truth, to_pred


def _check(pred: Mask, truth: Mask) -> None:
    if pred.dtype != np.bool_ or truth.dtype != np.bool_ or pred.shape != truth.shape:
        raise ValueError(
            f"expected two bool arrays of one shape, got {pred.dtype} {pred.shape} "
            f"and {truth.dtype} {truth.shape}"
        )


def _step(volume: Mask, spacing: Spacing | None) -> tuple[float, ...]:
    """Check the spacing against the volume; an unknown spacing is 1 voxel."""
    step = (1.0,) * volume.ndim if spacing is None else tuple(spacing)
    if volume.ndim != 3 or len(step) != 3 or not all(math.isfinite(s) and s > 0 for s in step):
        raise ValueError(
            f"expected a volume (D, H, W) and a positive spacing (z, y, x), got {volume.shape} and {spacing}"
        )
    return step


def _cropped(pred: Mask, truth: Mask) -> tuple[Mask, Mask]:
    """Crop both to their common bounding box, padded by one voxel of background to keep their surfaces."""
    where = np.argwhere(pred | truth)
    box = tuple(slice(low, high + 1) for low, high in zip(where.min(0), where.max(0), strict=True))
    return np.pad(pred[box], 1), np.pad(truth[box], 1)


def _surface(mask: Mask) -> Mask:
    """Return the foreground voxels with a background neighbor across a face."""
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


@dataclass
class Scores:
    """Hold the scores of a set of volumes. A metric without any scored volume is None.

    by_class: {class: {metric: mean over scored volumes}}
    mean: {metric: mean over classes}
    unit: of HD95, "mm" when the spacing of every volume is known, else "voxel"
    counts: {class: {scored, both_empty, pred_empty, truth_empty}}. The mean is over `scored` volumes, which
        include those with an empty prediction or an empty truth, but not those with both empty.
    """

    by_class: dict[str, dict[str, float | None]]
    mean: dict[str, float | None]
    unit: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"by_class": self.by_class, "mean": self.mean, "unit": self.unit, "counts": self.counts}


def score_volumes(
    pairs: Iterable[tuple[Labels, Labels, Spacing | None]], classes: Mapping[int, str]
) -> Scores:
    """Score volumes class by class.

    pairs: (prediction, truth, spacing) with class ids uint8 (D, H, W); classes: id to name.
    HD95 is in mm only if all volumes have a spacing. Raises ValueError when shapes differ.
    """
    volumes = list(pairs)
    unit = "mm" if volumes and all(spacing is not None for _, _, spacing in volumes) else "voxel"
    found: dict[str, dict[str, list[float]]] = {n: {m: [] for m in METRICS} for n in classes.values()}
    counts = {n: {"scored": 0, "both_empty": 0, "pred_empty": 0, "truth_empty": 0} for n in classes.values()}
    for index, (pred, truth, spacing) in enumerate(volumes):
        if pred.shape != truth.shape:
            raise ValueError(f"volume {index}: prediction has shape {pred.shape}, truth {truth.shape}")
        for class_id, name in classes.items():
            ours, theirs = pred == class_id, truth == class_id
            found_ours, found_theirs = bool(ours.any()), bool(theirs.any())
            counts[name]["scored" if found_ours or found_theirs else "both_empty"] += 1
            counts[name]["pred_empty"] += found_theirs and not found_ours
            counts[name]["truth_empty"] += found_ours and not found_theirs
            distance = hd95(ours, theirs, spacing if unit == "mm" else None)
            values = (dice(ours, theirs), iou(ours, theirs), iou_fgbg(ours, theirs), distance)
            for metric, value in zip(METRICS, values, strict=True):
                if value is not None:
                    found[name][metric].append(value)
    by_class = {n: {m: _mean(v) for m, v in metrics.items()} for n, metrics in found.items()}
    mean = {m: _mean([v for c in by_class.values() if (v := c[m]) is not None]) for m in METRICS}
    return Scores(by_class, mean, unit, counts)


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
