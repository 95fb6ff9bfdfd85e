"""Keep worklists in a folder: images, every version of their labels, and decisions.

One folder a key, one folder a worklist in it, three kinds of files an item: `<id>.json` (the state),
`<id>.image.png`, and one `<id>.<n>.labels.png` for each version of the labels. The files of volumes lie in
`volumes/<id>/` (`worklists.volumes`). Every file is written whole, the state last, so that a kill at any
point leaves the item as it was before the change.
"""

import contextlib
import hashlib
import re
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vessa.codec import image_digest
from vessa.errors import InternalError, InvalidRequest, TooLarge, UnknownWorklist
from vessa_server.auth.keys import Caller
from vessa_server.serialization.image_files import label_png, png_bytes
from vessa_server.settings import Settings, default_store
from vessa_server.storage.files import close_to_others, disk, make_private
from vessa_server.worklists.folders import HEAD, ITEM_ID, WorklistFolders, item_files, key_folder, remove_item
from vessa_server.worklists.records import Item, Worklist, encode, read_png

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_VERSIONS = 32  # of one item's labels; the oldest is dropped, and undo ends there
MOST_ITEMS = 5000  # of one worklist
MOST_WORKLISTS = 256  # of one key


def folder_of(settings: Settings) -> Path:
    """Return `worklists_folder`, else a folder beside a folder store's banks, else in the user's data."""
    scheme, _, place = settings.storage.store.partition(":")
    folder = Path(place).expanduser() if scheme == "folder" else Path(default_store().partition(":")[2])
    return settings.console.worklists_folder or folder / ".worklists"


class WorklistStore(WorklistFolders):
    """The worklists of all keys. Safe to share between threads and processes.

    folder: of all worklists; most_bytes: that one key may hold in all of its worklists
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        super().__init__(folder)
        self.most_bytes = most_bytes

    def create(self, name: str, bank: str, caller: Caller) -> Worklist:
        """Return the worklist of this name, made when the caller has none. Raises InvalidRequest, TooLarge.

        A worklist whose head file is damaged gets a new one; its images and labels stay.
        """
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                "a worklist's name is 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit, "
                f"got {name[:80]!r}"
            )
        path = self._path(name, caller)
        with disk("written"):
            make_private(path.parent)
            close_to_others(self.folder)
        if not path.exists() and len(self.folders(path.parent)) >= MOST_WORKLISTS:
            raise TooLarge(
                f"key {caller.name!r} has {MOST_WORKLISTS} worklists, the limit. Delete one (DELETE "
                "/worklists/NAME)."
            )
        with self.changing(path, make=True):
            if self.head(path) is None:
                self.write(path / HEAD, encode(Worklist(name, caller.name, bank, time.time())))
        return self.get(name, caller)

    def worklists(self, caller: Caller) -> list[Worklist]:
        """Return the caller's readable worklists by name."""
        found = [self.head(path) for path in self.folders(self.folder / key_folder(caller.name))]
        return [worklist for worklist in found if worklist is not None]

    def get(self, name: str, caller: Caller) -> Worklist:
        """Return one worklist. Raises UnknownWorklist, also for another key's, InternalError when damaged."""
        path = self._path(name, caller) if NAME.fullmatch(name) else None
        if path is None or not (path / HEAD).exists():
            raise UnknownWorklist(f"there is no worklist {name[:80]!r}; POST /worklists makes one")
        found = self.head(path)
        if found is None:
            raise InternalError(
                f"worklist {name!r} is damaged. POST /worklists with its name and bank restores it, DELETE "
                "removes it with its images."
            )
        return found

    def delete(self, name: str, caller: Caller) -> None:
        """Delete a worklist with all its images and labels, also a damaged one. Raises UnknownWorklist."""
        with contextlib.suppress(InternalError):
            self.get(name, caller)
        path = self._path(name, caller)
        gone = path.with_name(f".{name}.{secrets.token_hex(4)}.gone")
        with disk("deleted"):
            with self.changing(path):
                path.rename(gone)  # at once and whole: after a kill, `sweep` removes the rest
            shutil.rmtree(gone)

    def items(self, worklist: Worklist) -> list[Item]:
        """Return the readable items in the order in which they were added."""
        found = [self.read(file) for file in item_files(self.place(worklist))]
        return sorted((item for item in found if item is not None), key=lambda i: (i.added, i.name))

    def item(self, worklist: Worklist, identity: str) -> Item:
        """Return one item. Raises UnknownWorklist when there is none, InternalError when it is damaged."""
        path = self.place(worklist) / f"{identity}.json"
        if not ITEM_ID.fullmatch(identity) or not path.exists():
            raise UnknownWorklist(f"worklist {worklist.name!r} has no item {identity[:40]!r}")
        found = self.read(path)
        if found is None:
            raise InternalError(f"item {identity} is damaged. Remove it (DELETE) and add its image again.")
        return found

    def add(self, worklist: Worklist, image: NDArray[np.uint8], name: str, group: str, **fields: Any) -> Item:
        """Add an image, uint8 (H, W[, 3]), and further fields; the same image of the same name is added once.

        Raises TooLarge when the key's share of bytes or the worklist's number of items is used up.
        """
        digest = image_digest(image)
        identity = hashlib.sha256(f"{digest}\n{group}\n{name}".encode()).hexdigest()[:32]
        path = self.place(worklist)
        data = png_bytes(Image.fromarray(image))
        with self.changing(path):
            known = self.read(path / f"{identity}.json")
            if known is not None:
                return known
            count = sum(1 for _ in path.glob("*.image.png"))
            if count >= MOST_ITEMS:
                raise TooLarge(
                    f"worklist {worklist.name!r} is full: {count} of {MOST_ITEMS} images; make another one"
                )
            self.check_share(worklist.owner, len(data))
            height, width = image.shape[:2]
            item = Item(identity, name, group, height, width, time.time(), image_id=digest, **fields)
            self.write(path / f"{identity}.image.png", data)
            self.write(path / f"{identity}.json", encode(item))
        return item

    def image(self, worklist: Worklist, item: Item) -> NDArray[np.uint8]:
        """Return the pixels of an item, uint8 (H, W[, 3]). Raises InternalError when they are damaged."""
        return read_png(self.place(worklist) / f"{item.id}.image.png")

    def image_file(self, worklist: Worklist, item: Item) -> bytes:
        """Return an item's image as the bytes of a PNG file."""
        with disk("read"):
            return (self.place(worklist) / f"{item.id}.image.png").read_bytes()

    def is_color(self, worklist: Worklist, item: Item) -> bool | None:
        """Return whether an item's image is RGB, by the header of its file; None for a damaged one."""
        try:
            with Image.open(self.place(worklist) / f"{item.id}.image.png", formats=["PNG"]) as image:
                return image.mode == "RGB"
        except (OSError, SyntaxError, ValueError):
            return None

    def labels(self, worklist: Worklist, item: Item) -> NDArray[np.uint8] | None:
        """Return the newest labels of an item, uint8 (H, W) class ids; None when it has none."""
        if not item.versions:
            return None
        return read_png(self.place(worklist) / f"{item.id}.{item.versions[-1]}.labels.png")

    def set_labels(self, worklist: Worklist, item: Item, labels: NDArray[np.uint8], **changes: Any) -> Item:
        """Add a version of an item's labels, uint8 (H, W), and change further fields with it."""
        path, data = self.place(worklist), label_png(labels)
        with self.changing(path):
            now = self.item(worklist, item.id)
            number = (now.versions[-1] if now.versions else 0) + 1
            self.check_share(worklist.owner, len(data))
            self.write(path / f"{item.id}.{number}.labels.png", data)
            versions = (*now.versions, number)
            changed = replace(now, versions=versions[-MOST_VERSIONS:], **changes)
            self.write(path / f"{item.id}.json", encode(changed))
            for old in versions[:-MOST_VERSIONS]:
                (path / f"{item.id}.{old}.labels.png").unlink(missing_ok=True)
        return changed

    def undo(self, worklist: Worklist, item: Item) -> Item:
        """Return to the labels before the newest ones. Raises InvalidRequest when there are none."""
        path = self.place(worklist)
        with self.changing(path):
            now = self.item(worklist, item.id)
            if len(now.versions) < 2:
                raise InvalidRequest(f"nothing to undo: image {now.name[:80]!r} has no earlier labels")
            changed = replace(now, versions=now.versions[:-1], edited=len(now.versions) > 2 and now.edited)
            self.write(path / f"{item.id}.json", encode(changed))
            (path / f"{item.id}.{now.versions[-1]}.labels.png").unlink(missing_ok=True)
        return changed

    def change(self, worklist: Worklist, item: Item, **changes: Any) -> Item:
        """Change fields of an item and return it."""
        path = self.place(worklist)
        with self.changing(path):
            changed = replace(self.item(worklist, item.id), **changes)
            self.write(path / f"{item.id}.json", encode(changed))
        return changed

    def remove(self, worklist: Worklist, identity: str) -> None:
        """Remove an item with its image and labels, also a damaged one. Raises UnknownWorklist."""
        with contextlib.suppress(InternalError):
            self.item(worklist, identity)
        path = self.place(worklist)
        with disk("deleted"), self.changing(path):
            remove_item(path, identity)
            self.drop_volumes(path)

    def bytes_of(self, owner: str) -> int:
        """Return the bytes of all files of a key's worklists."""
        held = 0
        for file in (self.folder / key_folder(owner)).rglob("*"):
            with contextlib.suppress(OSError):
                held += file.stat().st_size
        return held

    def check_share(self, owner: str, coming: int) -> None:
        """Raise TooLarge when `coming` more bytes are over the share of a key."""
        held = self.bytes_of(owner)
        if held + coming > self.most_bytes:
            raise TooLarge(
                f"the worklists of key {owner!r} are full: {held} of {self.most_bytes} bytes. Delete a "
                "worklist (DELETE /worklists/NAME) or raise VESSA_WORKLIST_BYTES"
            )

    def _path(self, name: str, caller: Caller) -> Path:
        return self.folder / key_folder(caller.name) / name

    def place(self, worklist: Worklist) -> Path:
        """Return the folder of a worklist."""
        return self.folder / key_folder(worklist.owner) / worklist.name
