"""The types of `segment`: prompts, options and annotations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import PIL.Image

from vessa import atomic_write
from vessa.answers.notebook import answer_html, png_of
from vessa.errors import BadResponse, InvalidRequest, ShapeMismatch, VessaError
from vessa.masks.overlay import overlay as draw_overlay
from vessa.schemas import Cleaning, Provenance, TemplateUse

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


@dataclass(frozen=True, repr=False)
class Annotation:
    """The annotator's result for one image.

    labels: uint8 (H, W) with the bank's class ids, 0 is background
    confidence: uint8 (H, W), 0 to 255 for a highest class probability of 0 to 1
    probabilities: float16 (K + 1, H, W), background first; only on request
    classes: id to name, in the order of the request
    templates: class name to the templates that were used
    scores: class name to predicted IoU
    absent: names of the classes that the bank's absence threshold left out
    bank_digest: names the contents of the bank; bank_version only counts its changes
    error: set when this item failed; its arrays are None
    annotation_id: id in the service's cache; `annotation` returns it with `provenance`, without confidence
    adaptation: digest of the bank's adapted weights, None when the common weights were used
    cleaning: what cleaning did to the labels, None where they are as they were predicted
    image: uint8 (H, W[, 3]), set by `segment_image`
    """

    image_id: str
    labels: Image | None = None
    confidence: Image | None = None
    probabilities: Floats | None = None
    classes: dict[int, str] = field(default_factory=dict)
    templates: dict[str, list[TemplateUse]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    model: str = ""
    bank_version: int = 0
    bank_digest: str = ""
    labels_version: str = ""
    error: VessaError | None = None
    annotation_id: str = ""
    adaptation: str | None = None
    provenance: Provenance | None = None
    cleaning: Cleaning | None = None
    image: Image | None = None

    def __repr__(self) -> str:
        """Return one line: area and score of each class, or the error."""
        if self.labels is None:
            return f"Annotation(error: {self.error!r})"
        parts = [
            f"{name}: {area} px" + (f", score {self.scores[name]:.2f}" if name in self.scores else "")
            for name, area in self.areas().items()
        ]
        return f"Annotation({'; '.join(parts) or 'no class'})"

    def areas(self) -> dict[str, int]:
        """Return class name to area in px. Raises the annotation's error."""
        counts = np.bincount(self._labels().ravel(), minlength=256)
        return {name: int(counts[class_id]) for class_id, name in self.classes.items()}

    def overlay(self, image: Image | None = None) -> Image:
        """Draw the labels over the image; returns uint8 (H, W, 3).

        image: uint8 (H, W[, 3]); default: the annotation's own image
        Raises InvalidRequest without an image, ShapeMismatch when its size differs from the labels, and the
        error of the annotation.
        """
        labels, under = self._labels(), self.image if image is None else image
        if under is None:
            raise InvalidRequest("the annotation has no image: give it, as in annotation.overlay(image)")
        if under.shape[:2] != labels.shape:
            raise ShapeMismatch(f"the image has size {under.shape[:2]}, the labels {labels.shape}")
        return draw_overlay(under, labels)

    def save(self, path: Path | str) -> None:
        """Write the labels as an 8-bit PNG of class ids.

        Raises InvalidRequest for another suffix, and the annotation's error. For .nii.gz, .seg.nrrd and
        .dcm, which need the geometry of a volume, see `AnnotatorClient.label_volume`.
        """
        if Path(path).suffix.lower() != ".png":
            raise InvalidRequest(
                f"'{path}' does not end in .png; for NIfTI, NRRD and DICOM SEG use client.label_volume"
            )
        labels = self._labels()
        with atomic_write.replacing(Path(path)) as fresh:
            PIL.Image.fromarray(labels).save(fresh, "PNG")

    def _repr_png_(self) -> bytes | None:
        """Show the overlay in notebooks, where the annotation has an image."""
        return None if self.image is None or self.labels is None else png_of(self.overlay())

    def _repr_html_(self) -> str | None:
        """Show area and score of each class in notebooks, beside the overlay."""
        if self.labels is None:
            return None
        areas, ids = self.areas(), {name: class_id for class_id, name in self.classes.items()}
        rows = [
            (ids[name], (name, str(area), f"{self.scores[name]:.2f}" if name in self.scores else ""))
            for name, area in areas.items()
        ]
        return answer_html(("class", "px", "score"), rows, self._repr_png_())

    def _labels(self) -> Image:
        if self.labels is None:
            raise self.error or BadResponse("the annotation has neither labels nor an error")
        return self.labels


class SegmentOptions(TypedDict, total=False):
    """Options of `segment` besides images and bank. Lists have one entry per image.

    classes: names to segment; None: all classes of the bank (one list for all images)
    groups: the patient of each image; templates of the same patient are not used
    prompts: see Prompts
    template_choice: "top1", "top3" or "sample", which draws a template with `seed`
    probabilities: whether annotations contain probabilities
    clean: whether the service keeps the largest component of classes that have one in every template
    """

    classes: Sequence[str] | None
    groups: Sequence[str | None] | None
    prompts: Sequence[Prompts | None] | None
    template_choice: TemplateChoice
    seed: int
    probabilities: bool
    clean: bool
