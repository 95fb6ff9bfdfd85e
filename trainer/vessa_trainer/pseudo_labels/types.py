"""The annotator's label of one image, and where a step gets labels from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class PseudoLabel:
    """VESSA's label of one image at its own size. labels, confidence: uint8 (H, W)."""

    labels: np.ndarray
    confidence: np.ndarray


class LabelSource(Protocol):
    """Where a step gets VESSA's labels from; see `vessa_trainer.pseudo_labels.prefetcher`."""

    def take(self, names: list[str]) -> list[PseudoLabel | None]:
        """Labels of some slices by name; None is late, and the step goes without it."""
        ...
