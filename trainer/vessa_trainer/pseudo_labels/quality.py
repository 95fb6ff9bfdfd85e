"""Score VESSA's labels where the truth is known, and measure how much they echo their prompts.

Both are reported and never used for training.
"""

from collections.abc import Sequence

import numpy as np

from vessa.client import Prompts
from vessa.datasets.base import IGNORE


class PooledDice:
    """Dice between two label maps of many images, pooled per class; an image seen again replaces itself."""

    def __init__(self, class_ids: Sequence[int]) -> None:
        self.class_ids = tuple(class_ids)
        self._counts: dict[str, np.ndarray] = {}  # name to (K, 2): twice the overlap, both areas
        self._total = np.zeros((len(self.class_ids), 2), np.int64)

    def add(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Count one image. ours, theirs: (H, W) class ids, or (K, H, W) bool."""
        one, other = self._masks(ours), self._masks(theirs)
        fresh = np.stack([2 * (one & other).sum((1, 2)), one.sum((1, 2)) + other.sum((1, 2))], 1)
        self._total += fresh - self._counts.get(name, 0)
        self._counts[name] = fresh

    def _masks(self, array: np.ndarray) -> np.ndarray:
        return array if array.ndim == 3 else np.stack([array == c for c in self.class_ids])

    def value(self) -> float | None:
        """Mean over the classes that occur, in [0, 1]; None when none does."""
        overlap, areas = self._total.T
        there = areas > 0
        return float((overlap[there] / areas[there]).mean()) if there.any() else None


class Calibration:
    """Compare the confidence of labels with how often they are right; an image seen again replaces itself.

    Pixels count where the label or the truth shows a structure: background is nearly always right.
    """

    BINS = 10

    def __init__(self) -> None:
        self._counts: dict[str, np.ndarray] = {}  # name to (BINS, 3): pixels, sum of confidence, right ones
        self._total = np.zeros((self.BINS, 3))

    def add(self, name: str, labels: np.ndarray, confidence: np.ndarray, truth: np.ndarray) -> None:
        """Count one image.

        labels, truth: (H, W) class ids; truth is 255 where not annotated
        confidence: (H, W) uint8 0..255, 0 where there is no label
        """
        counted = (confidence > 0) & (truth != IGNORE) & ((labels > 0) | (truth > 0))
        sure = confidence[counted] / 255
        bins = np.minimum((sure * self.BINS).astype(int), self.BINS - 1)
        right = (labels == truth)[counted]
        fresh = np.stack([np.bincount(bins, w, self.BINS) for w in (np.ones_like(sure), sure, right)], 1)
        self._total += fresh - self._counts.get(name, 0)
        self._counts[name] = fresh

    def curve(self) -> list[dict[str, float]]:
        """Return the reliability curve: confidence, share that is right, and share of the pixels, by bin."""
        pixels = float(self._total[:, 0].sum())
        return [
            {"confidence": sure / n, "right": right / n, "share": n / pixels}
            for n, sure, right in self._total.tolist()
            if n > 0
        ]

    def value(self) -> float | None:
        """Compute the expected calibration error: mean of |confidence - share right|; None when empty."""
        curve = self.curve()
        return sum(b["share"] * abs(b["confidence"] - b["right"]) for b in curve) if curve else None


class EchoCheck:
    """Compare labels with the mask prompts they answer, and with the labels they replace.

    `after` far above `before`, without better labels where the truth is known, means that VESSA repeats the
    source of the prompts.
    """

    def __init__(self, class_ids: Sequence[int]) -> None:
        self._class_ids = tuple(class_ids)
        self.before, self.after = PooledDice(class_ids), PooledDice(class_ids)

    def add(self, name: str, prompts: Prompts, old: np.ndarray, new: np.ndarray) -> None:
        """Count one refreshed image. old, new: (H, W) class ids."""
        if prompts.mask_logits is None:
            return
        logits = np.asarray(prompts.mask_logits)
        asked = logits > 0
        present = np.ones(len(asked), bool)
        if prompts.mask_present is not None:
            present = np.asarray(prompts.mask_present, bool)
        for dice, labels in ((self.before, old), (self.after, new)):
            small = _shrink(labels, logits.shape[-2:])
            masks = np.stack([small == c for c in self._class_ids])
            # a class without a prompt was not asked about
            dice.add(name, masks & present[:, None, None], asked & present[:, None, None])


def _shrink(labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Nearest neighbors at the centers of a coarser grid."""
    rows, columns = (
        ((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]
