"""Inputs and results of the annotator: templates and images in, labels out."""

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vessa.schemas import Cleaning, Provenance, TemplateUse

# Version of pre- and post-processing: raise it when the same weights would give other labels.
LABELS_VERSION = "5"

Method = Literal["encode_templates", "describe", "segment"]  # methods of the annotator


@dataclass(frozen=True)
class ModelInfo:
    """The loaded model.

    model: digest of the weights; device: name of the device that holds them
    language: whether there is a language model
    trained_on: names of the data sets of Stage 1, None where the weights do not state them
    """

    model: str
    preset: str
    device: str
    language: bool
    trained_on: tuple[str, ...] | None


def scoped_id(client: str, image_id: str) -> str:
    """Return the id under which an image of one client is cached.

    An image id is a digest of the pixels, which others may know. Only the client that sent the pixels can
    refer to them, and no client learns that another one has sent an image. Names of clients hold no slash.
    """
    return f"{client}/{image_id}"


def public_id(scoped: str) -> str:
    """Return the image id that clients know."""
    return scoped.partition("/")[2] or scoped


@dataclass(frozen=True)
class TemplateItem:
    """An annotated image to encode.

    image: uint8 (H, W[, 3]); mask: uint8 (H, W) class ids; classes: name by id; group: its patient
    """

    method: ClassVar[Method] = "encode_templates"

    image: np.ndarray
    mask: np.ndarray
    classes: dict[int, str]
    group: str


@dataclass(frozen=True)
class DescribeItem:
    """An image whose retrieval feature is requested. image: uint8 (H, W[, 3])."""

    method: ClassVar[Method] = "describe"

    image_id: str
    image: np.ndarray


@dataclass(frozen=True)
class SegmentItem:
    """One query image, or the id of a cached one, with its prompts in native px (see `vessa.codec`)."""

    method: ClassVar[Method] = "segment"

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

    def key(self, bank_digest: str) -> str:
        """Return a digest of everything that the result depends on, besides the weights."""
        plain = (self.image_id, self.image is None, self.bank, bank_digest, self.classes, self.group)
        digest = hashlib.sha256(repr((*plain, self.template_choice, self.seed, self.probabilities)).encode())
        for name in ("boxes", "points", "point_labels", "mask_logits", "mask_present"):
            array = getattr(self, name)
            if array is not None:
                digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


Item = TemplateItem | DescribeItem | SegmentItem


@dataclass(frozen=True)
class SegmentResult:
    """The segmentation of one image.

    labels: uint8 (H, W) class ids; confidence: uint8 (H, W), 0..255
    probabilities: float16 (K + 1, H, W), background first, or None
    adaptation: digest of the bank's own weights, None where the common weights served
    cleaning: what cleaning did, None where labels are as they were predicted
    absence_threshold, absent, islands: see Provenance
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
    bank_digest: str = ""
    cleaning: Cleaning | None = None
    absence_threshold: float = 0.0
    absent: tuple[str, ...] = ()
    islands: dict[str, int] = field(default_factory=dict)

    @property
    def doubt(self) -> float:
        """1 - mean confidence over the labeled pixels, over all pixels where nothing is labeled."""
        labeled = self.labels > 0
        certain = self.confidence[labeled] if labeled.any() else self.confidence
        return round(1 - float(certain.mean()) / 255, 4)


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer for one image, with its provenance.

    id: hex SHA-256 of the provenance and the labels, so that an id never names other labels
    labels: uint8 (H, W); confidence, probabilities: None when the answer comes from the cache
    """

    id: str
    provenance: Provenance
    labels: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None
    probabilities: NDArray[np.float16] | None = None
