"""Define the JSON bodies of the worklist routes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vessa_server.worklists.records import Decision, Item, StoredVolume, Worklist


class NewWorklist(BaseModel):
    """Body of POST /worklists. bank: whose templates annotate its images."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=64)
    bank: str = Field(max_length=64)


class WorklistInfo(BaseModel):
    """A worklist and how many of its images have each decision."""

    name: str
    bank: str
    images: int
    accepted: int
    rejected: int
    open: int


class ItemInfo(BaseModel):
    """One image of a worklist.

    labels: number of its newest label map, 0 before there is one; doubt: 1 - mean confidence, None before
    the annotator was asked; edited: whether a person changed the labels; templates: id, group and
    similarity of those that guided each class; volume, slice: the volume that it is a slice of, and its place
    """

    id: str
    name: str
    group: str
    height: int
    width: int
    labels: int
    can_undo: bool
    decision: Decision
    doubt: float | None
    edited: bool
    in_bank: bool
    templates: dict[str, list[dict[str, Any]]]
    scores: dict[str, float]
    volume: str
    slice: int


class VolumeInfo(BaseModel):
    """A volume whose slices are items. job: that segments it, empty when none does; notes: of its files."""

    id: str
    name: str
    slices: int
    dicom: bool
    job: str
    notes: list[str]


class TakenLabels(BaseModel):
    """How many slices took the labels of a job, and how many kept their own."""

    taken: int
    kept: int


class WorklistContent(WorklistInfo):
    """A worklist with its items and volumes, and the classes of its bank."""

    classes: dict[int, str]
    items: list[ItemInfo]
    volumes: list[VolumeInfo]


class OrderedItem(BaseModel):
    """An open image. gain: share in [0, 1] of the bank's coverage loss that annotating it removes."""

    id: str
    gain: float


class WorklistOrder(BaseModel):
    """The open images of a worklist, the most useful one first."""

    items: list[OrderedItem]


class SegmentBody(BaseModel):
    """What to segment, and prompts by class name in px, as POST /segment takes them."""

    model_config = ConfigDict(extra="forbid")

    classes: list[str] | None = None
    boxes: dict[str, list[float]] = {}
    points: dict[str, list[list[float]]] = {}
    point_labels: dict[str, list[int]] = {}
    template_choice: Literal["top1", "top3"] = "top1"


class DecisionBody(BaseModel):
    """A decision about an image. add_to_bank: with accepted, also make it a template (role curate)."""

    model_config = ConfigDict(extra="forbid")

    decision: Decision
    add_to_bank: bool = False


def worklist_info(worklist: Worklist, items: list[Item]) -> WorklistInfo:
    """Return a worklist with the number of its items by decision."""
    counts: dict[str, int] = {"open": 0, "accepted": 0, "rejected": 0}
    for item in items:
        counts[item.decision] += 1
    return WorklistInfo(name=worklist.name, bank=worklist.bank, images=len(items), **counts)


def item_info(item: Item) -> ItemInfo:
    """Return an item as the service answers it."""
    return ItemInfo(
        id=item.id,
        name=item.name,
        group=item.group,
        height=item.height,
        width=item.width,
        labels=item.versions[-1] if item.versions else 0,
        can_undo=len(item.versions) > 1,
        decision=item.decision,
        doubt=item.doubt,
        edited=item.edited,
        in_bank=item.in_bank,
        templates=item.templates,
        scores=item.scores,
        volume=item.volume,
        slice=item.slice,
    )


def volume_info(volume: StoredVolume) -> VolumeInfo:
    """Return a volume as the service answers it."""
    return VolumeInfo(
        id=volume.id,
        name=volume.name,
        slices=volume.slices,
        dicom=volume.dicom,
        job=volume.job,
        notes=list(volume.notes),
    )
