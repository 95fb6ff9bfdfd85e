"""What a caller gives to `segment` and gets from it."""

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
    """Prompts of one image for K classes, in px of the image as it is sent.

    boxes: (K, 4) XYXY, a row of -1 means none; points: (K, P, 2) (x, y) with point_labels (K, P)
    1 inside, 0 outside, -1 padding; mask_logits: (K, h, w) over the whole image, any h and w, with
    mask_present (K,) bool, absent = all present
    """

    boxes: Floats | None = None
    points: Floats | None = None
    point_labels: Floats | None = None
    mask_logits: Floats | None = None
    mask_present: Floats | None = None


@dataclass(frozen=True)
class Annotation:
    """The annotator's answer for one image.

    labels: uint8 (H, W) with the bank's class ids; confidence: uint8 (H, W), 255 is certain;
    probabilities: float16 (K + 1, H, W), background first, when asked for; classes: id to name in
    the order of the request; scores: predicted IoU of each class; error: set when this item failed,
    its arrays are None then; annotation_id: to ask for it again, then with `provenance` but without
    confidence; adaptation: digest of the bank's own weights, None where the common ones served
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
    labels_version: str = ""
    error: VessaError | None = None
    annotation_id: str = ""
    adaptation: str | None = None
    provenance: Provenance | None = None


class SegmentOptions(TypedDict, total=False):
    """What `segment` takes besides images and bank; each list has one entry an image.

    classes: names, absent = all of the bank; groups: the patient of each image, whose templates are
    not used; prompts: see Prompts; template_choice: "top1", "top3" or "sample" with `seed`;
    probabilities: ask for them
    """

    classes: Sequence[str] | None
    groups: Sequence[str | None] | None
    prompts: Sequence[Prompts | None] | None
    template_choice: TemplateChoice
    seed: int
    probabilities: bool
