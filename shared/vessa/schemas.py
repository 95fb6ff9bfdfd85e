"""What travels as JSON between the annotator and its clients."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    # A field added by a newer service must not break an older client.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ErrorBody(_Frozen):
    """code: stable; message: for people; item: index within a batch."""

    code: str
    message: str
    item: int | None = None


class ErrorResponse(_Frozen):
    """Body of every failed request."""

    error: ErrorBody


class TemplateInfo(_Frozen):
    """One template of a bank. classes: those its mask shows; created: False when it was there already."""

    id: str
    bank: str
    group: str
    classes: dict[int, str]
    height: int
    width: int
    created: bool = True


class BankInfo(_Frozen):
    """One template bank. version: raised by each change; templates: how many; groups: patients.

    adapted: whether weights of its own serve it
    """

    name: str
    version: int
    templates: int
    groups: list[str]
    classes: dict[int, str]
    adapted: bool = False


class AdaptationFigures(_Frozen):
    """What adapting to a bank was worth. before, after: mean Dice of held-out templates in [0, 1].

    kept: whether it helped, and is in use; bank_version: whose templates it learned from
    """

    before: float
    after: float
    kept: bool
    steps: int
    seconds: float
    bank_version: int


class AdaptationInfo(_Frozen):
    """Adaptation of a bank. progress: of a running one, in [0, 1]; error: why the last one failed."""

    bank: str
    state: Literal["none", "running", "done", "failed"]
    progress: float = 0.0
    figures: AdaptationFigures | None = None
    error: str | None = None


class TemplateUse(_Frozen):
    """A template that guided a mask. similarity: cosine in [-1, 1]."""

    id: str
    group: str
    similarity: float


class Rle(_Frozen):
    """COCO compressed run-length encoding: column-major, size (height, width)."""

    size: tuple[int, int]
    counts: str


class ClassMask(_Frozen):
    """One class of an answer. score: predicted IoU in [0, 1]; area: px."""

    class_id: int
    class_name: str
    score: float | None
    area: int
    rle: Rle


class SegmentAnswer(_Frozen):
    """JSON answer for one image."""

    image_id: str
    height: int
    width: int
    bank: str
    bank_version: int
    model: str
    masks: list[ClassMask]
    templates: dict[str, list[TemplateUse]]


class ItemInfo(_Frozen):
    """What a batch answer says of one item besides its arrays."""

    status: Literal["ok", "error"]
    error: ErrorBody | None = None
    image_id: str
    templates: dict[str, list[TemplateUse]] = {}
    scores: dict[str, float] = {}


class ServiceInfo(_Frozen):
    """What is running.

    model: digest of the weights; labels_version: of pre- and post-processing; parts: "language" and
    "memory", as far as they take part in the answers; trained_on: what Stage 1 saw, None where the
    weights are official ones that went through no Stage 1
    """

    version: str
    preset: str
    model: str
    device: str
    limits: dict[str, int]
    banks: list[BankInfo]
    labels_version: str
    parts: list[str]
    trained_on: list[str] | None
