"""The files of worklists: their locks, damage, erasure, and what killed processes left behind."""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from vessa.atomic_write import write_bytes
from vessa.errors import UnknownWorklist
from vessa_server.storage.files import disk
from vessa_server.worklists.records import Item, StoredVolume, Worklist, encode, read_record

_Record = TypeVar("_Record", Item, Worklist, StoredVolume)
log = logging.getLogger(__name__)

ITEM_ID = re.compile(r"[0-9a-f]{32}")
HEAD = "worklist.json"
VOLUMES = "volumes"  # folder of the files that slices were cut from, one folder a volume
VOLUME_HEAD = "volume.json"


class WorklistFolders:
    """The folders of all keys' worklists. A damaged file is named in the log and left out.

    Safe to share between threads and processes: changes hold a file lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reported: set[Path] = set()

    def erase_group(self, group: str) -> int:
        """Remove a patient from the worklists of all keys; returns the number of removed items.

        Also removes the patient's name from what guided other items. `damaged` names what was not searched.
        """
        erased = 0
        for path in self._all():
            with disk("deleted"), self._locked(path):
                gone = set()
                for head in path.glob(f"{VOLUMES}/*/{VOLUME_HEAD}"):
                    volume = self.volume(head)
                    if volume is not None and group == (volume.group or volume.name):
                        gone.add(volume.id)
                        shutil.rmtree(head.parent)
                for file in item_files(path):
                    item = self.read(file)
                    if item is None:
                        continue
                    if group in (item.group, item.patient) or item.volume in gone:
                        remove_item(path, item.id)
                        erased += 1
                    elif (without := item.without_patient(group)) != item:
                        self.write(file, encode(without))
                self.drop_volumes(path)
        return erased

    def damaged(self, *, repair: bool = False) -> dict[str, tuple[str, str]]:
        """Return {place in the folder: (problem, its repair)} of damaged files; repair: remove damaged items.

        Only its owner restores the head of a worklist, because that file named the bank.
        """
        found = {}
        for path in self._all():
            place = path.relative_to(self.folder)
            if self.head(path) is None:
                mending = "nothing: POST /worklists with its name and bank restores it"
                found[str(place)] = (f"{HEAD} cannot be read", mending)
            for file in item_files(path):
                if self.read(file) is None and file.exists():
                    mending = "remove the item; add its image again"
                    found[str(place / file.stem)] = ("its state cannot be read", mending)
                    if repair:
                        remove_item(path, file.stem)
            for head in path.glob(f"{VOLUMES}/[!.]*/{VOLUME_HEAD}"):
                if self.volume(head) is None and head.exists():
                    mending = "remove the volume's files; its slices stay"
                    found[str(place / VOLUMES / head.parent.name)] = ("its record cannot be read", mending)
                    if repair:
                        shutil.rmtree(head.parent)
        return found

    def sweep(self) -> None:
        """Remove what killed processes left: parts of deleted worklists, and files without their item."""
        for path in self.folder.glob("*/.*.gone"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._all():
            with self._locked(path):
                kept = {HEAD, VOLUMES}
                self.drop_volumes(path)
                for file in item_files(path):
                    item = self.read(file)
                    if item is None:  # damaged: all its files stay for whoever mends it
                        kept.update(p.name for p in path.glob(f"{file.stem}.*"))
                    else:
                        labels = [f"{item.id}.{number}.labels.png" for number in item.versions]
                        kept.update((file.name, f"{item.id}.image.png", *labels))
                for file in path.iterdir():
                    if file.name not in kept:
                        file.unlink(missing_ok=True)

    def drop_volumes(self, path: Path) -> None:
        """Remove the files of volumes without a slice; none while a damaged item may be such a slice."""
        items = [self.read(file) for file in item_files(path)]
        kept = {item.volume for item in items if item is not None}
        for folder in path.glob(f"{VOLUMES}/*"):
            if folder.name.startswith(".") or (folder.name not in kept and None not in items):
                shutil.rmtree(folder, ignore_errors=True)

    def folders(self, key_folder: Path) -> list[Path]:
        """Return the folders of the worklists of a key, sorted by name."""
        return sorted(path for path in key_folder.glob("[!.]*") if path.is_dir())

    def head(self, path: Path) -> Worklist | None:
        """Return the worklist of a folder, None without a readable head."""
        return self._record(path / HEAD, Worklist)

    def read(self, path: Path) -> Item | None:
        """Return an item, None when it was removed or is damaged."""
        return self._record(path, Item)

    def volume(self, path: Path) -> StoredVolume | None:
        """Return the volume of a record's file, None when it was removed or is damaged."""
        return self._record(path, StoredVolume)

    def _record(self, path: Path, kind: type[_Record]) -> _Record | None:
        try:
            found = read_record(path, kind)
        except (OSError, ValueError):
            if path not in self._reported:  # once, and not at each request
                self._reported.add(path)
                log.error("%s is damaged and left out; `vessa-server store check` lists such files", path)
            return None
        self._reported.discard(path)
        return found

    def _all(self) -> list[Path]:
        return [path for key in sorted(self.folder.glob("[!.]*")) for path in self.folders(key)]

    @staticmethod
    def write(path: Path, data: bytes) -> None:
        """Write a file whole, readable by its owner alone. Raises StoreUnavailable."""
        with disk("written"):
            write_bytes(path, data, 0o600)

    @contextlib.contextmanager
    def changing(self, path: Path, *, make: bool = False) -> Iterator[None]:
        """Hold the lock of a worklist. Raises UnknownWorklist when it was deleted, unless `make`."""
        with self._locked(path):
            if make:
                path.mkdir(exist_ok=True, mode=0o700)
            elif not (path / HEAD).exists():
                raise UnknownWorklist(f"worklist {path.name!r} was deleted meanwhile")
            yield

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with disk("locked"):
            try:
                lock = path.with_name(f".{path.name}.lock")
                handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                raise UnknownWorklist(f"there is no worklist {path.name!r}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def item_files(path: Path) -> list[Path]:
    """Return the files that hold the states of a worklist's items, damaged ones too."""
    return [file for file in sorted(path.glob("*.json")) if ITEM_ID.fullmatch(file.stem)]


def remove_item(path: Path, identity: str) -> None:
    """Remove the files of an item from the folder of its worklist."""
    (path / f"{identity}.json").unlink(missing_ok=True)  # first: without it the rest is litter
    for file in path.glob(f"{identity}.*"):
        file.unlink(missing_ok=True)


def key_folder(key: str) -> str:
    """Return the name of the folder that holds the worklists of a key."""
    # Names of keys are harmless (auth.keys.KEY_NAME), except that "." begins one; a digest is always a name.
    return hashlib.sha256(key.encode()).hexdigest()[:24]
