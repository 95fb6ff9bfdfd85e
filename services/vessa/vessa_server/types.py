"""What goes through the annotator: templates and images in, labels out."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vessa.schemas import Provenance, TemplateUse

LABELS_VERSION = "4"  # of pre- and post-processing: raise it when the same weights would answer differently


@dataclass(frozen=True)
class TemplateItem:
    """An annotated image. image: uint8 (H, W[, 3]); mask: uint8 (H, W) class ids; classes: id to name."""

    image: np.ndarray
    mask: np.ndarray
    classes: dict[int, str]
    group: str


@dataclass(frozen=True)
class DescribeItem:
    """An image of which only the feature is asked. image: uint8 (H, W[, 3])."""

    image_id: str
    image: np.ndarray


@dataclass(frozen=True)
class SegmentItem:
    """One query image, or the id of one seen before, with its prompts in native px (see `vessa.codec`)."""

    image_id: str
    image: np.ndarray | None
    bank: str
    classes: tuple[str, ...] = ()
    group: str | None = None
    boxes: np.ndarray | None = None
    points: np.ndarray | None = None
    point_labels: np.ndarray | None = None
    mask_logits: np.ndarray | None = None
    mask_present: np.ndarray | None = None
    template_choice: str = "top1"
    seed: int = 0
    probabilities: bool = False

    def key(self, bank_version: int) -> str:
        """Return a digest of all that the result depends on, besides the weights."""
        plain = (self.image_id, self.image is None, self.bank, bank_version, self.classes, self.group)
        digest = hashlib.sha256(repr((*plain, self.template_choice, self.seed, self.probabilities)).encode())
        for name in ("boxes", "points", "point_labels", "mask_logits", "mask_present"):
            array = getattr(self, name)
            if array is not None:
                digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class SegmentResult:
    """labels, confidence: uint8 (H, W); probabilities: float16 (K + 1, H, W) or None, background first.

    adaptation: digest of the bank's own weights, None where the common ones served
    """

    image_id: str
    labels: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray | None
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    scores: dict[str, float]
    templates: dict[str, list[TemplateUse]]
    bank_version: int
    adaptation: str | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer for one image. labels: uint8 (H, W); confidence, probabilities: None once it was kept.

    id: SHA-256 of what made it and of its labels, hex: it never names other labels
    """

    id: str
    made: Provenance
    labels: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None
    probabilities: NDArray[np.float16] | None = None
