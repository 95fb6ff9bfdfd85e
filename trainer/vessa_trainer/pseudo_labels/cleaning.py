"""Clean the annotator's labels volume by volume before the student learns from them."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping

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
        self.single = single_component_classes(_labeled_volumes(dataset, labeled))
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
        stacked = stack_slices([one.labels for one in labels.values()])
        if stacked is None:
            if not self._uneven[case]:
                _log.warning("%s has slices of different sizes: its labels are not smoothed along z", case)
            self._uneven[case] += 1
            parts = [self._one_volume({name: one}) for name, one in labels.items()]
        else:
            parts = [self._one_volume(labels)]
        self._removed[case] = sum(removed for _, removed in parts)
        self._voxels[case] = sum(int((one.labels > 0).sum()) for one in labels.values())
        return {name: label for part, _ in parts for name, label in part.items()}

    def _one_volume(self, labels: Mapping[str, PseudoLabel]) -> tuple[dict[str, PseudoLabel], int]:
        cleaned = clean_volume(
            np.stack([one.labels for one in labels.values()]),
            np.stack([one.confidence for one in labels.values()]),
            single=self.single,
        )
        slices = zip(labels, cleaned.labels, cleaned.confidence, strict=True)
        removed = sum(cleaned.removed.values())
        return {name: PseudoLabel(one, sure, cleaned.box) for name, one, sure in slices}, removed

    def removed_share(self) -> float | None:
        """Return the share of foreground voxels removed as islands from the newest labels."""
        total = sum(self._voxels.values())
        return sum(self._removed.values()) / total if total else None


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
