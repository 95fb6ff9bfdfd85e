"""Define the JSON schemas between the annotator and its clients."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    # A field added by a newer service must not break an older client.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ErrorBody(_Frozen):
    """code: stable; message: for people; item: index within a batch; request_id: to find it in the log."""

    code: str
    message: str
    item: int | None = None
    request_id: str | None = None


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


class TemplateInfos(_Frozen):
    """Answer to a POST /templates of many."""

    templates: list[TemplateInfo]


class BankInfo(_Frozen):
    """One template bank. version: number of changes; templates: how many; groups: patients.

    digest: names the contents, all that labels depend on; adapted: whether own weights serve it; owner: name
    of the key that made it, None when unknown; shared: whether other keys may use it
    """

    name: str
    version: int
    templates: int
    groups: list[str]
    classes: dict[int, str]
    digest: str = ""
    adapted: bool = False
    owner: str | None = None
    shared: bool = False


ADAPTATION_IMAGES = 400  # unlabeled images of one adaptation
ADAPTATION_SIDE = 240  # px of their squares


class AdaptationFigures(_Frozen):
    """What adapting to a bank was worth. before, after: mean Dice of held-out templates in [0, 1].

    kept: whether it helped, and is in use; bank_version: whose templates it learned from; images: unlabeled
    ones that it learned from
    """

    before: float
    after: float
    kept: bool
    steps: int
    seconds: float
    bank_version: int
    images: int = 0


class AdaptationInfo(_Frozen):
    """Adaptation of a bank. progress: of a running one, in [0, 1]; error: why the last one failed."""

    bank: str
    state: Literal["none", "running", "done", "failed"]
    progress: float = 0.0
    figures: AdaptationFigures | None = None
    error: str | None = None


ERASED = "erased"  # stands for an erased patient among the templates that guided a mask


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


class Cleaning(_Frozen):
    """What cleaning did to labels; see `vessa.masks.cleaning`.

    version: of the procedure; single: classes of which the largest component alone was kept; neighbor_weight:
    of each neighboring slice in the smoothing along z, 0 without; removed: class name to px or voxels
    """

    version: int
    single: list[str]
    neighbor_weight: float = 0.0
    removed: dict[str, int] = {}


class Provenance(_Frozen):
    """What made an answer: the same again makes the same labels.

    height, width: px; bank_version: number of changes of the bank; bank_digest: names its contents; model:
    digest of the weights; adaptation: digest of the bank's own, None where the common ones served;
    labels_version: of pre- and post-processing; classes: id to name, in the requested order; group: whose
    templates were not used; seed: the request's; boxes: XYXY px, points: (x, y, label) px, mask_logits:
    `vessa.codec.array_digest`, each by its class; templates: those that guided each class; scores: predicted
    IoU in [0, 1]; absence_threshold: a class whose highest probability is lower, and which no prompt asserts,
    is left out (0: none); absent: names of the classes left out; islands: px removed from each class of one
    piece; cleaning: None where no cleaning was requested
    """

    image_id: str
    height: int
    width: int
    bank: str
    bank_version: int
    bank_digest: str = ""
    model: str
    adaptation: str | None = None
    labels_version: str = ""
    classes: dict[int, str] = {}
    group: str | None = None
    template_choice: str = "top1"
    seed: int = 0
    boxes: dict[str, list[float]] = {}
    points: dict[str, list[tuple[float, float, int]]] = {}
    mask_logits: dict[str, str] = {}
    templates: dict[str, list[TemplateUse]]
    scores: dict[str, float] = {}
    cleaning: Cleaning | None = None
    absence_threshold: float = 0.0
    absent: list[str] = []
    islands: dict[str, int] = {}

    def without_patient(self, group: str) -> "Provenance":
        """Return the provenance with an erased patient's name replaced among the templates."""
        templates = {
            name: [use.model_copy(update={"group": ERASED}) if use.group == group else use for use in uses]
            for name, uses in self.templates.items()
        }
        return self.model_copy(update={"templates": templates})


class SegmentAnswer(Provenance):
    """JSON answer for one image. annotation_id: names it for GET /annotations/{id}."""

    annotation_id: str = ""
    masks: list[ClassMask]


class ItemInfo(_Frozen):
    """What a batch answer says of one item besides its arrays.

    annotation_id: names it for GET /annotations/{id}; bank_version, adaptation, absent, cleaning: see
    Provenance
    """

    status: Literal["ok", "error"]
    error: ErrorBody | None = None
    image_id: str
    annotation_id: str = ""
    bank_version: int | None = None
    bank_digest: str = ""
    adaptation: str | None = None
    templates: dict[str, list[TemplateUse]] = {}
    scores: dict[str, float] = {}
    cleaning: Cleaning | None = None
    absent: list[str] = []


class Erasure(_Frozen):
    """Report what was removed of a patient.

    banks: that held templates of it; templates, jobs, annotations: how many were removed; viewer_sessions:
    how many were ended; unreadable_banks, _jobs, _worklist_items: damaged ones, which were not searched
    """

    banks: list[str]
    templates: int
    jobs: int
    worklist_items: int = 0
    annotations: int
    viewer_sessions: int = 0
    unreadable_banks: list[str] = []
    unreadable_jobs: list[str] = []
    unreadable_worklist_items: list[str] = []


class Suggestion(_Frozen):
    """What to annotate next.

    group: the patient, an image's id where it has none; image_ids: its images, the least covered first; gain:
    share in [0, 1] of the candidates' coverage loss that it takes away
    """

    group: str
    image_ids: list[str]
    gain: float


class Suggestions(_Frozen):
    """Answer of POST /banks/{bank}/suggest: suggestions, the best first.

    bank_version: 0 for a bank that is not there yet; image_ids: of the candidates, in the request's order;
    unknown: those of them whose pixels the service needs first. Then there are no suggestions
    """

    bank: str
    bank_version: int
    bank_digest: str = ""
    image_ids: list[str]
    unknown: list[str] = []
    suggestions: list[Suggestion] = []


class JobInfo(_Frozen):
    """A volume in the background.

    done: finished slices; result: nifti, dicom-seg or nrrd; error: why it failed; notes: what was repaired in
    the files or is missing from them, one sentence each; cleaning: what cleaning did to the labels of a
    finished job, None without
    """

    id: str
    state: Literal["queued", "running", "done", "failed"]
    bank: str
    slices: int
    done: int
    result: Literal["nifti", "dicom-seg", "nrrd"]
    error: str | None = None
    notes: list[str] = []
    cleaning: Cleaning | None = None


class ServiceInfo(_Frozen):
    """What is running.

    model: digest of the weights; labels_version: of pre- and post-processing; parts: "language" and
    "memory", as far as they take part in the answers; trained_on: what Stage 1 saw, None where the
    weights are official ones that went through no Stage 1; for admins only: damaged_banks: name to reason of
    the banks that are set aside, warnings: what an operator should mend
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
    damaged_banks: dict[str, str] = {}
    warnings: list[str] = []
