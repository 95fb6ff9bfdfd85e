"""Keep worklists in a folder: images, every version of their labels, and decisions.

One folder a key, one folder a worklist in it, three kinds of files an item: `<id>.json` (the state),
`<id>.image.png`, and one `<id>.<n>.labels.png` for each version of the labels. Every file is written whole,
the state last, so that a kill at any point leaves the item as it was before the change.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vessa.atomic_write import write_bytes
from vessa.codec import image_digest
from vessa.errors import InvalidRequest, TooLarge, UnknownWorklist
from vessa_server.auth.keys import Caller
from vessa_server.serialization.image_files import label_png, png_bytes
from vessa_server.settings import Settings, default_store
from vessa_server.storage.files import disk

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ITEM_ID = re.compile(r"[0-9a-f]{32}")
MOST_VERSIONS = 32  # of one item's labels; the oldest is dropped, and undo ends there
MOST_ITEMS = 5000  # of one worklist
Decision = Literal["open", "accepted", "rejected"]


@dataclass(frozen=True)
class Item:
    """One image of a worklist.

    name, group: as they were given; height, width: px; versions: numbers of the kept label maps, the newest
    last; doubt: 1 - mean confidence of the annotator over what it labeled, None before it was asked;
    edited: whether a person changed the newest labels; templates: those that guided it, as in Provenance;
    history: earlier decisions, the newest last
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


@dataclass(frozen=True)
class Worklist:
    """A named list of images of one key, annotated by one bank."""

    name: str
    owner: str
    bank: str
    created: float


def folder_of(settings: Settings) -> Path:
    """Return `worklists_folder`, else a folder beside a folder store's banks, else in the user's data."""
    scheme, _, place = settings.storage.store.partition(":")
    folder = Path(place).expanduser() if scheme == "folder" else Path(default_store().partition(":")[2])
    return settings.console.worklists_folder or folder / ".worklists"


class WorklistStore:
    """The worklists of all keys. Safe to share between threads and processes: changes hold a file lock.

    folder: of all worklists; most_bytes: that one key may hold in all of its worklists
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def create(self, name: str, bank: str, caller: Caller) -> Worklist:
        """Return the worklist of this name, made when the caller has none. Raises InvalidRequest."""
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                "a worklist's name is 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit, "
                f"got {name[:80]!r}"
            )
        made = Worklist(name, caller.name, bank, time.time())
        path = self._path(name, caller)
        with self._changing(path):
            if not (path / "worklist.json").exists():
                self._write(path / "worklist.json", json.dumps(asdict(made)).encode())
        return self.get(name, caller)

    def worklists(self, caller: Caller) -> list[Worklist]:
        """Return the caller's worklists by name."""
        folder = self.folder / _key_folder(caller.name)
        found = [self._read(path) for path in sorted(folder.glob("*/worklist.json"))]
        return [worklist for worklist in found if worklist is not None]

    def get(self, name: str, caller: Caller) -> Worklist:
        """Return one worklist. Raises UnknownWorklist, also for another key's."""
        found = self._read(self._path(name, caller) / "worklist.json") if NAME.fullmatch(name) else None
        if found is None:
            raise UnknownWorklist(f"there is no worklist {name[:80]!r}; POST /worklists makes one")
        return found

    def delete(self, name: str, caller: Caller) -> None:
        """Delete a worklist with all its images and labels. Raises UnknownWorklist."""
        self.get(name, caller)
        path = self._path(name, caller)
        with disk("deleted"), self._changing(path):
            shutil.rmtree(path)

    def items(self, worklist: Worklist) -> list[Item]:
        """Return the items in the order in which they were added."""
        path = self._folder(worklist)
        found = [read_item(file) for file in path.glob("*.json") if ITEM_ID.fullmatch(file.stem)]
        return sorted((item for item in found if item is not None), key=lambda i: (i.added, i.name))

    def item(self, worklist: Worklist, identity: str) -> Item:
        """Return one item. Raises UnknownWorklist when the worklist has none of this id."""
        found = (
            read_item(self._folder(worklist) / f"{identity}.json") if ITEM_ID.fullmatch(identity) else None
        )
        if found is None:
            raise UnknownWorklist(f"worklist {worklist.name!r} has no item {identity[:40]!r}")
        return found

    def add(self, worklist: Worklist, image: NDArray[np.uint8], name: str, group: str) -> Item:
        """Add an image, uint8 (H, W[, 3]); the same image of the same name is added once.

        Raises TooLarge when the key's share of bytes or the worklist's number of items is used up.
        """
        digest = image_digest(image)
        identity = hashlib.sha256(f"{digest}\n{group}\n{name}".encode()).hexdigest()[:32]
        path = self._folder(worklist)
        data = png_bytes(Image.fromarray(image))
        with self._changing(path):
            known = read_item(path / f"{identity}.json")
            if known is not None:
                return known
            count = sum(1 for _ in path.glob("*.image.png"))
            if count >= MOST_ITEMS:
                raise TooLarge(
                    f"worklist {worklist.name!r} is full: {count} of {MOST_ITEMS} images; make another one"
                )
            self._check_share(worklist.owner, len(data))
            item = Item(identity, name, group, image.shape[0], image.shape[1], time.time(), image_id=digest)
            self._write(path / f"{identity}.image.png", data)
            self._write(path / f"{identity}.json", json.dumps(asdict(item)).encode())
        return item

    def image(self, worklist: Worklist, item: Item) -> NDArray[np.uint8]:
        """Return the pixels of an item, uint8 (H, W[, 3])."""
        return _read_png(self._folder(worklist) / f"{item.id}.image.png")

    def image_file(self, worklist: Worklist, item: Item) -> bytes:
        """Return an item's image as the bytes of a PNG file."""
        with disk("read"):
            return (self._folder(worklist) / f"{item.id}.image.png").read_bytes()

    def labels(self, worklist: Worklist, item: Item) -> NDArray[np.uint8] | None:
        """Return the newest labels of an item, uint8 (H, W) class ids; None when it has none."""
        if not item.versions:
            return None
        return _read_png(self._folder(worklist) / f"{item.id}.{item.versions[-1]}.labels.png")

    def set_labels(self, worklist: Worklist, item: Item, labels: NDArray[np.uint8], **changes: Any) -> Item:
        """Add a version of an item's labels, uint8 (H, W), and change further fields with it."""
        path, data = self._folder(worklist), label_png(labels)
        with self._changing(path):
            now = self.item(worklist, item.id)
            number = (now.versions[-1] if now.versions else 0) + 1
            self._check_share(worklist.owner, len(data))
            self._write(path / f"{item.id}.{number}.labels.png", data)
            versions = (*now.versions, number)
            changed = replace(now, versions=versions[-MOST_VERSIONS:], **changes)
            self._write(path / f"{item.id}.json", json.dumps(asdict(changed)).encode())
            for old in versions[:-MOST_VERSIONS]:
                (path / f"{item.id}.{old}.labels.png").unlink(missing_ok=True)
        return changed

    def undo(self, worklist: Worklist, item: Item) -> Item:
        """Return to the labels before the newest ones. Raises InvalidRequest when there are none."""
        path = self._folder(worklist)
        with self._changing(path):
            now = self.item(worklist, item.id)
            if len(now.versions) < 2:
                raise InvalidRequest(f"nothing to undo: image {now.name[:80]!r} has no earlier labels")
            changed = replace(now, versions=now.versions[:-1], edited=len(now.versions) > 2 and now.edited)
            self._write(path / f"{item.id}.json", json.dumps(asdict(changed)).encode())
            (path / f"{item.id}.{now.versions[-1]}.labels.png").unlink(missing_ok=True)
        return changed

    def change(self, worklist: Worklist, item: Item, **changes: Any) -> Item:
        """Change fields of an item and return it."""
        path = self._folder(worklist)
        with self._changing(path):
            changed = replace(self.item(worklist, item.id), **changes)
            self._write(path / f"{item.id}.json", json.dumps(asdict(changed)).encode())
        return changed

    def remove(self, worklist: Worklist, item: Item) -> None:
        """Remove an item with its image and labels."""
        path = self._folder(worklist)
        with disk("deleted"), self._changing(path):
            (path / f"{item.id}.json").unlink(missing_ok=True)  # first: without it the rest is litter
            for file in path.glob(f"{item.id}.*"):
                file.unlink(missing_ok=True)

    def erase_group(self, group: str) -> int:
        """Remove every item of a patient from the worklists of all keys; returns how many."""
        erased = 0
        for path in self.folder.glob("*/*/worklist.json"):
            worklist = self._read(path)
            if worklist is None:
                continue
            for item in self.items(worklist):
                if item.group == group:
                    self.remove(worklist, item)
                    erased += 1
        return erased

    def bytes_of(self, owner: str) -> int:
        """Return the bytes of all files of a key's worklists."""
        held = 0
        for file in (self.folder / _key_folder(owner)).rglob("*"):
            with contextlib.suppress(OSError):
                held += file.stat().st_size
        return held

    def _check_share(self, owner: str, coming: int) -> None:
        held = self.bytes_of(owner)
        if held + coming > self.most_bytes:
            raise TooLarge(
                f"the worklists of key {owner!r} are full: {held} of {self.most_bytes} bytes. Delete a "
                "worklist (DELETE /worklists/NAME) or raise VESSA_WORKLIST_BYTES"
            )

    def _path(self, name: str, caller: Caller) -> Path:
        return self.folder / _key_folder(caller.name) / name

    def _folder(self, worklist: Worklist) -> Path:
        return self.folder / _key_folder(worklist.owner) / worklist.name

    def _read(self, path: Path) -> Worklist | None:
        try:
            return Worklist(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        with disk("written"):
            write_bytes(path, data, 0o600)

    @contextlib.contextmanager
    def _changing(self, path: Path) -> Iterator[None]:
        with disk("locked"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            path.mkdir(exist_ok=True, mode=0o700)  # it may have been deleted while this waited
            yield
        finally:
            os.close(handle)


def read_item(path: Path) -> Item | None:
    """Return a kept item; None when it was removed or its file is damaged."""
    try:
        values = json.loads(path.read_bytes())
        return Item(**{**values, "versions": tuple(values["versions"]), "history": tuple(values["history"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _key_folder(key: str) -> str:
    # Names of keys are harmless (auth.keys.KEY_NAME), except that "." begins one; a digest is always a name.
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def _read_png(path: Path) -> NDArray[np.uint8]:
    with disk("read"), Image.open(path, formats=["PNG"]) as image:
        return np.array(image, dtype=np.uint8)
