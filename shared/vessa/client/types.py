"""The types of `segment`: prompts, options and annotations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np

from vessa.errors import VessaError
from vessa.schemas import Provenance, TemplateUse

Image = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, Any]
TemplateChoice = Literal["top1", "top3", "sample"]


@dataclass(frozen=True)
class Prompts:
    """Prompts of one image for K classes, in px of the image that is sent.

    boxes: (K, 4) XYXY; a row of -1: the class has no box
    points: (K, P, 2) (x, y)
    point_labels: (K, P), 1 inside, 0 outside, -1 padding
    mask_logits: (K, h, w) over the whole image, any h and w
    mask_present: (K,) bool, whether the class has mask logits; None: all have
    """

    boxes: Floats | None = None
    points: Floats | None = None
    point_labels: Floats | None = None
    mask_logits: Floats | None = None
    mask_present: Floats | None = None


@dataclass(frozen=True)
class Annotation:
    """The annotator's result for one image.

    labels: uint8 (H, W) with the bank's class ids, 0 is background
    confidence: uint8 (H, W), 0 to 255 for a highest class probability of 0 to 1
    probabilities: float16 (K + 1, H, W), background first; only on request
    classes: id to name, in the order of the request
    templates: class name to the templates that were used
    scores: class name to predicted IoU
    bank_digest: names the contents of the bank; bank_version only counts its changes
    error: set when this item failed; its arrays are None
    annotation_id: id in the service's cache; `annotation` returns it with `provenance`, without confidence
    adaptation: digest of the bank's adapted weights, None when the common weights were used
    """

    image_id: str
    labels: Image | None = None
    confidence: Image | None = None
    probabilities: Floats | None = None
    classes: dict[int, str] = field(default_factory=dict)
    templates: dict[str, list[TemplateUse]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    model: str = ""
    bank_version: int = 0
    bank_digest: str = ""
    labels_version: str = ""
    error: VessaError | None = None
    annotation_id: str = ""
    adaptation: str | None = None
    provenance: Provenance | None = None


class SegmentOptions(TypedDict, total=False):
    """Options of `segment` besides images and bank. Lists have one entry per image.

    classes: names to segment; None: all classes of the bank (one list for all images)
    groups: the patient of each image; templates of the same patient are not used
    prompts: see Prompts
    template_choice: "top1", "top3" or "sample", which draws a template with `seed`
    probabilities: whether annotations contain probabilities
    """

    classes: Sequence[str] | None
    groups: Sequence[str | None] | None
    prompts: Sequence[Prompts | None] | None
    template_choice: TemplateChoice
    seed: int
    probabilities: bool
