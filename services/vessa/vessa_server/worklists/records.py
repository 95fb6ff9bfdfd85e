"""Define what a worklist's files hold, and read them."""

import io
import zlib
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from vessa.errors import InternalError
from vessa.schemas import ERASED
from vessa_server.storage.files import disk

Decision = Literal["open", "accepted", "rejected"]


@dataclass(frozen=True)
class Item:
    """One image of a worklist.

    name, group: as they were given; height, width: px; versions: numbers of the kept label maps, the newest
    last; doubt: 1 - mean confidence of the annotator over what it labeled, None before it was asked;
    edited: whether a person changed the newest labels; templates: those that guided it, as in Provenance;
    history: earlier decisions, the newest last; volume, slice: whose slice it is, and its place
    """

    id: str
    name: str
    group: str
    height: int
    width: int
    added: float
    versions: tuple[int, ...] = ()
    decision: Decision = "open"
    history: tuple[Decision, ...] = ()
    doubt: float | None = None
    edited: bool = False
    in_bank: bool = False
    image_id: str = ""
    templates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    volume: str = ""
    slice: int = 0

    @property
    def patient(self) -> str:
        """The patient of a template that is made of this image."""
        return self.group or self.name

    def without_patient(self, group: str) -> "Item":
        """Return the item with a patient's name removed from the templates that guided it."""
        templates = {
            name: [use | {"group": ERASED} if use.get("group") == group else use for use in uses]
            for name, uses in self.templates.items()
        }
        return replace(self, templates=templates)


@dataclass(frozen=True)
class Worklist:
    """A named list of images of one key, annotated by one bank."""

    name: str
    owner: str
    bank: str
    created: float


@dataclass(frozen=True)
class StoredVolume:
    """One volume of a worklist.

    name: of the file, or of the folder of a series; axis: along which slices are cut; shape: (I, J, K);
    affine: (4, 4) from indexes to mm, RAS+; dicom: whether a DICOM SEG can refer to it; job: the volume job
    that segments it, empty when none does; notes: what was repaired in the files
    """

    id: str
    name: str
    group: str
    axis: int
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    dicom: bool
    job: str = ""
    notes: tuple[str, ...] = ()

    @property
    def slices(self) -> int:
        """Number of slices along the axis."""
        return self.shape[self.axis]


_Record = TypeVar("_Record", Item, Worklist, StoredVolume)
_ADAPTERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Item, Worklist, StoredVolume)}


def encode(record: Item | Worklist | StoredVolume) -> bytes:
    """Return the bytes of a record's file."""
    return _ADAPTERS[type(record)].dump_json(record)


def read_record(path: Path, kind: type[_Record]) -> _Record | None:
    """Return a stored record, None when it was removed. Raises ValueError when its file is damaged."""
    try:
        record: _Record = _ADAPTERS[kind].validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    if isinstance(record, Item) and record.id != path.stem:
        raise ValueError("it belongs to another item")
    if isinstance(record, StoredVolume) and record.id != path.parent.name:
        raise ValueError("it belongs to another volume")
    return record


def read_png(path: Path) -> NDArray[np.uint8]:
    """Return the pixels of a stored PNG. Raises InternalError when it is missing or damaged."""
    with disk("read"):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
    if not _is_whole(data):
        raise InternalError(
            f"A stored file of item {path.name.partition('.')[0]} is missing or damaged. Remove the item "
            "(DELETE) and add its image again."
        )
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.array(image, dtype=np.uint8)


def _is_whole(data: bytes) -> bool:
    """Return whether all chunks of a PNG file match their checksums. Pillow skips those of the pixels."""
    place, name = 8, b""
    while name != b"IEND" and place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        name = data[place + 4 : place + 8]
        if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            return False
        place = end
    return name == b"IEND" and place == len(data)
