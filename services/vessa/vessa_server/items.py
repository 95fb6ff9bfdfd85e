"""What goes through the annotator: templates and images in, labels out."""

from dataclasses import dataclass

import numpy as np

from vessa.schemas import TemplateUse


@dataclass(frozen=True)
class TemplateItem:
    """An annotated image. image: uint8 (H, W[, 3]); mask: uint8 (H, W) class ids; classes: id to name."""

    image: np.ndarray
    mask: np.ndarray
    classes: dict[int, str]
    group: str


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


@dataclass(frozen=True)
class SegmentResult:
    """labels, confidence: uint8 (H, W); probabilities: float16 (K + 1, H, W) or None, background first."""

    image_id: str
    labels: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray | None
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    scores: dict[str, float]
    templates: dict[str, list[TemplateUse]]
    bank_version: int
