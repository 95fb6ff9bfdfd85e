"""Clean the annotator's labels volume by volume before the student learns from them."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from vessa.datasets import Dataset
from vessa.masks.cleaning import clean_volume, single_component_classes, stack_slices
from vessa_trainer.pseudo_labels.types import PseudoLabel

_log = logging.getLogger(__name__)


class VolumeCleaner:
    """Smooths a volume's labels along z and removes islands; see `vessa.masks.cleaning`.

    The classes that lose islands are those that form one component in every labeled volume. Not
    thread-safe: one thread cleans.
    """

    def __init__(self, dataset: Dataset, labeled: Collection[str]) -> None:
        """Learn from the masks of the labeled groups which classes form one component."""
        self._cases = {c.name: tuple(s.name for s in c.slices) for c in dataset.cases()}
        self._case_of = {s.name: c.name for c in dataset.cases() for s in c.slices}
        self.single = single_classes(dataset, labeled)
        self._removed: dict[str, int] = {}  # case to voxels, of its newest labels
        self._voxels: dict[str, int] = {}
        self._uneven: Counter[str] = Counter()

    def volume_of(self, name: str) -> tuple[str, ...]:
        """Return the names of all slices of the volume that a slice belongs to, in order."""
        return self._cases[self._case_of[name]]

    def clean(self, labels: Mapping[str, PseudoLabel]) -> dict[str, PseudoLabel]:
        """Clean the labels of one volume, by the names of its slices in order.

        Slices of different sizes have no common z axis: each is then cleaned by itself.
        """
        case = self._case_of[next(iter(labels))]
        if stack_slices([one.labels for one in labels.values()]) is None:
            if not self._uneven[case]:
                _log.warning("%s has slices of different sizes: its labels are not smoothed along z", case)
            self._uneven[case] += 1
        cleaned, self._removed[case] = clean_labels(list(labels.values()), self.single)
        self._voxels[case] = sum(int((one.labels > 0).sum()) for one in labels.values())
        return dict(zip(labels, cleaned, strict=True))

    def removed_share(self) -> float | None:
        """Return the share of foreground voxels removed as islands from the newest labels."""
        total = sum(self._voxels.values())
        return sum(self._removed.values()) / total if total else None


def single_classes(dataset: Dataset, labeled: Collection[str]) -> tuple[int, ...]:
    """Return the class ids that form one component in every volume of the labeled groups."""
    return single_component_classes(_labeled_volumes(dataset, labeled))


def clean_labels(labels: Sequence[PseudoLabel], single: Collection[int]) -> tuple[list[PseudoLabel], int]:
    """Clean the labels of one volume, slices in order; returns them and how many voxels were removed.

    Slices of different sizes are cleaned one by one. single: classes that keep their largest component alone
    """
    if stack_slices([one.labels for one in labels]) is None:
        parts = [clean_labels([one], single) for one in labels]
        return [found[0] for found, _ in parts], sum(removed for _, removed in parts)
    cleaned = clean_volume(
        np.stack([one.labels for one in labels]),
        np.stack([one.confidence for one in labels]),
        single=single,
    )
    pairs = zip(cleaned.labels, cleaned.confidence, strict=True)
    return [PseudoLabel(ids, sure, cleaned.box) for ids, sure in pairs], sum(cleaned.removed.values())


def _labeled_volumes(dataset: Dataset, groups: Collection[str]) -> list[np.ndarray]:
    """Read the annotated volumes of some groups; slices of different sizes count as volumes of their own."""
    volumes: list[np.ndarray] = []
    for case in dataset.cases():
        if case.group not in groups:
            continue
        masks = [mask for s in case.slices if (mask := dataset.mask(s)) is not None]
        stacked = stack_slices(masks) if masks else None
        volumes += [stacked] if stacked is not None else [mask[None] for mask in masks]
    return volumes
