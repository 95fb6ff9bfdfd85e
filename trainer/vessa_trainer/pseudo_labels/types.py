"""The annotator's label of one image, and where a step gets labels from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vessa.client import Annotation
from vessa.schemas import ServiceInfo


@dataclass(frozen=True)
class PseudoLabel:
    """VESSA's label of one image at its own size.

    labels: uint8 (H, W) class ids; confidence: uint8 (H, W), 0 where nothing is known
    box: XYXY px around all structures of the image's volume; None where unknown or empty
    """

    labels: np.ndarray
    confidence: np.ndarray
    box: tuple[int, int, int, int] | None = None

    def probabilities(self, class_ids: Sequence[int]) -> np.ndarray:
        """Return class probabilities, float32 (C, H, W): its class has the confidence, the others the rest.

        class_ids: of all C classes, background among them
        """
        sure = self.confidence.astype(np.float32) / 255
        rest = (1 - sure) / max(len(class_ids) - 1, 1)
        return np.stack([np.where(self.labels == one, sure, rest) for one in class_ids])


@dataclass(frozen=True)
class LabelBatch:
    """The labels of one training step.

    labels: in the order of the names; None is late, and the step does without it
    waited: seconds that the step waited for them
    """

    labels: list[PseudoLabel | None]
    waited: float = 0.0


class LabelService(Protocol):
    """A provider of labels: a client of the annotator, or a folder of its labels."""

    @property
    def url(self) -> str:
        """Its address, for messages."""
        ...

    def info(self) -> ServiceInfo:
        """Return which annotator answers."""
        ...

    @property
    def segment(self) -> Callable[..., list[Annotation]]:
        """Return one annotation an image; see `AnnotatorClient.segment`."""
        ...


class LabelSource(Protocol):
    """The source of a step's labels; see `vessa_trainer.pseudo_labels.prefetcher`."""

    def take(self, names: list[str]) -> LabelBatch:
        """Return the labels of some slices by name."""
        ...
