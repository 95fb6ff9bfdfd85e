"""Clean the label maps of a volume: smooth them along z, keep the largest component of a class.

A slice is segmented without its neighbors, so a volume holds islands and slices that differ from both
neighbors. On acdc cleaning raised the Dice of VESSA's labels from 0.764 to 0.796 (ten validation patients).
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from vessa.datasets.base import IGNORE
from vessa.masks.geometry import box_of

VERSION = 1  # of the procedure, for caches and provenance
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

NEIGHBOR_WEIGHT = 0.15  # of each of the two neighboring slices; the slice itself has the rest
_STRUCTURE = 0.2  # of a class's largest component: smaller components are islands
_SLAB = 16  # slices that are smoothed at once
_DOMINANT = 0.95  # of a class's voxels: a component with so many is the class's only one


@dataclass(frozen=True)
class CleanedVolume:
    """The labels of one volume after cleaning.

    labels, confidence: (D, H, W) uint8 class ids and 0..255. Removed voxels have label 0 and confidence 0:
    nothing is known of them.
    removed: voxels removed of each class, by class id
    box: XYXY px around all classes over all slices; None where no class is left
    """

    labels: Bytes
    confidence: Bytes
    removed: dict[int, int]
    box: tuple[int, int, int, int] | None


def single_component_classes(volumes: Iterable[Bytes]) -> tuple[int, ...]:
    """Find the classes that form one component in every annotated volume that shows them.

    volumes: (D, H, W) uint8 class ids, 255 where a voxel was not annotated. Two kidneys or several lesions
    are not of this kind.
    """
    dominant: dict[int, bool] = {}
    for labels in volumes:
        for class_id in np.unique(labels[(labels > 0) & (labels != IGNORE)]).tolist():
            components, _ = ndimage.label(labels == class_id)
            sizes = np.bincount(components.ravel())[1:]
            dominant[class_id] = dominant.get(class_id, True) and sizes.max() >= _DOMINANT * sizes.sum()
    return tuple(sorted(c for c, holds in dominant.items() if holds))


def clean_volume(
    labels: Bytes,
    confidence: Bytes,
    *,
    single: Collection[int],
    neighbor_weight: float = NEIGHBOR_WEIGHT,
) -> CleanedVolume:
    """Clean the labels of one volume.

    labels: (D, H, W) uint8 class ids; confidence: (D, H, W) uint8 0..255, 0 where there is no label
    single: classes of which the largest component alone is kept
    neighbor_weight: of each neighboring slice in the smoothing along z, in [0, 1/3]; 0 does not smooth
    """
    if labels.ndim != 3 or labels.shape != confidence.shape:
        raise ValueError(
            f"expected labels and confidence of one shape (D, H, W), got {labels.shape}, {confidence.shape}"
        )
    if not 0 <= neighbor_weight <= 1 / 3:
        raise ValueError(f"neighbor_weight must be in [0, 1/3], got {neighbor_weight}")
    if neighbor_weight and len(labels) > 1:
        labels, confidence = _smoothed(labels, confidence, neighbor_weight)
    labels, confidence = labels.copy(), confidence.copy()
    removed: dict[int, int] = {}
    for class_id in sorted(set(single)):
        components, count = ndimage.label(labels == class_id)
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            islands = (components > 0) & (components != sizes.argmax())
            labels[islands] = confidence[islands] = 0
            removed[class_id] = int(islands.sum())
    return CleanedVolume(labels, confidence, removed, box_of(np.asarray((labels > 0).any(0))))


def structure_box(labels: Bytes) -> tuple[int, int, int, int] | None:
    """Return the box XYXY px around the structures of a volume, without its small islands.

    labels: (D, H, W) uint8 class ids. Of each class the components count that have at least a fifth of its
    largest component's voxels: both kidneys, but no specks. None where the volume is empty.
    """
    shown = np.zeros(labels.shape[1:], bool)
    for class_id in np.unique(labels[labels > 0]).tolist():
        components, _ = ndimage.label(labels == class_id)
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        large = sizes >= _STRUCTURE * sizes.max()
        shown |= np.asarray(large[components].any(0))
    return box_of(shown)


def stack_slices(slices: Sequence[Bytes]) -> Bytes | None:
    """Stack the slices of a volume to (D, H, W); None where their sizes differ and there is no z axis."""
    if len({s.shape for s in slices}) != 1:
        return None
    return np.stack(slices)


def _smoothed(labels: Bytes, confidence: Bytes, weight: float) -> tuple[Bytes, Bytes]:
    """Average the class probabilities with those of both neighbors; voxels without a label stay so.

    A voxel gives its class its confidence, and the other classes the rest in equal parts.
    """
    ids = np.unique(labels).tolist()
    if 0 not in ids:
        ids.insert(0, 0)
    if len(ids) == 1:
        return labels, confidence
    kernel = np.array([weight, 1 - 2 * weight, weight], np.float32)
    found = np.zeros((2, *labels.shape), np.uint8)
    for start in range(0, len(labels), _SLAB):  # votes of all classes on a whole CT would take gigabytes
        first, last = max(0, start - 1), min(len(labels), start + _SLAB + 1)
        inside = slice(start - first, start - first + _SLAB)
        slab, sure = labels[first:last], confidence[first:last].astype(np.float32) / 255
        known = confidence[first:last] > 0
        votes = np.empty((len(ids), *slab.shape), np.float32)
        for row, class_id in enumerate(ids):
            share = np.where(slab == class_id, sure, (1 - sure) / (len(ids) - 1))
            votes[row] = ndimage.correlate1d(np.where(known, share, 0), kernel, axis=0, mode="nearest")
        total = np.maximum(votes.sum(0), 1e-6)
        smooth = np.asarray(ids, np.uint8)[votes.argmax(0)]
        value = np.maximum(np.rint(255 * votes.max(0) / total), 1).astype(np.uint8)
        for part, values in zip(found, (smooth, value), strict=True):
            part[start : start + _SLAB] = np.where(known, values, 0)[inside]
    return found[0], found[1]
