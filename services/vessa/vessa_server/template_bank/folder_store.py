"""Keep template banks in a folder."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from vessa.atomic_write import write_bytes
from vessa.errors import DamagedBank, StoreUnavailable
from vessa_server.storage.disk_reserve import DiskReserve
from vessa_server.storage.files import RETRY_AFTER_S, close_to_others, disk, make_private
from vessa_server.template_bank.index import Edit, Index, checked_blob, named_blobs, state_of

log = logging.getLogger(__name__)

LOCK_WAIT_S = 20.0
_SUFFIX = ".safetensors"


class FolderStore:
    """Keep each bank in `<folder>/<bank>/`: `index.json` and `blobs/<sha256>.safetensors`.

    Folders have mode 0700 and files 0600. Files are written under a fresh name, synced and renamed. One lock
    file orders the writers of all processes; readers need no lock. A reserve of disk space lets changes that
    only remove templates succeed on a full disk.
    """

    def __init__(self, folder: Path | str) -> None:
        """Create the folder if needed. Raises StoreUnavailable when that fails."""
        self.folder = Path(folder).expanduser()
        self._states: dict[str, tuple[tuple[int, int, int], str]] = {}
        with disk("opened"):
            make_private(self.folder)
            close_to_others(self.folder)
        self._reserve = DiskReserve(self.folder / ".reserve")
        self._reserve.fill()

    def names(self) -> list[str]:
        """Return the names of the existing banks and of those with a damaged index, sorted."""
        with disk("read"):
            found = sorted(path.parent.name for path in self.folder.glob("[!.]*/index.json"))
        return [name for name in found if self._may_exist(name)]

    def state(self, bank: str) -> str:
        """Return the digest of the stored index; reads the file only when it was replaced."""
        path = self.folder / bank / "index.json"
        with disk("read"):
            try:
                stat = path.stat()
                signature = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                known = self._states.get(bank)
                if known is None or known[0] != signature:
                    # If the file is replaced in between, the old signature makes the next call read again.
                    known = self._states[bank] = (signature, state_of(path.read_bytes()))
            except FileNotFoundError:
                return ""
        return known[1]

    def read(self, bank: str) -> Index:
        """Return the bank's index."""
        with disk("read"):
            try:
                data = (self.folder / bank / "index.json").read_bytes()
            except FileNotFoundError:
                return Index()
        return Index.from_json(data, bank)

    def blob(self, bank: str, digest: str) -> bytes | None:
        """Return a blob, or None when it is missing or damaged."""
        with disk("read"):
            try:
                data = self._blob_path(bank, digest).read_bytes()
            except FileNotFoundError:
                data = None
        return checked_blob(bank, digest, data)

    def blobs(self, bank: str) -> list[str]:
        """Return the digests under which blobs are stored."""
        with disk("read"):
            return sorted(p.name.removesuffix(_SUFFIX) for p in (self.folder / bank / "blobs").glob("[!.]*"))

    def change(self, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        """Apply `edit` under the lock: write blobs, then the index, then remove what it does not name."""
        with self._locked():
            old = self.read(bank)
            wanted = edit(old)
            if wanted is None:
                return old
            return self._store(bank, replace(wanted, version=old.version + 1), blobs)

    def reset(self, bank: str, index: Index) -> Index:
        """Store an index whatever is stored now."""
        with self._locked():
            return self._store(bank, index, {})

    def _may_exist(self, bank: str) -> bool:
        try:
            return self.read(bank).exists
        except DamagedBank:
            return True

    def _store(self, bank: str, wanted: Index, blobs: Mapping[str, bytes]) -> Index:
        new, data = wanted.stored()
        fresh = named_blobs(blobs, new)

        def write() -> None:
            for folder in (self.folder / bank, self.folder / bank / "blobs"):
                folder.mkdir(exist_ok=True, mode=0o700)
            for digest, blob in fresh.items():
                write_bytes(self._blob_path(bank, digest), blob, 0o600)
            write_bytes(self.folder / bank / "index.json", data, 0o600)
            self._sweep(bank, new)

        with disk("written"):
            if fresh:
                write()
            else:  # nothing is added: the reserve may pay for the new index
                self._reserve.spend(write)
        return new

    def _blob_path(self, bank: str, digest: str) -> Path:
        return self.folder / bank / "blobs" / f"{digest}{_SUFFIX}"

    def _sweep(self, bank: str, index: Index) -> None:
        # Leftovers of deleted templates and of writers that were killed. Safe: every writer holds the lock.
        kept = {self._blob_path(bank, digest).name for digest in index.blobs}
        for path in (self.folder / bank / "blobs").iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with disk("locked"):
            # The kernel drops a killed holder's lock, so a crash never leaves the store locked.
            handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise StoreUnavailable(
                            f"Another process has held the template store's lock for {LOCK_WAIT_S:g} s. "
                            "Retry later.",
                            retry_after=RETRY_AFTER_S,
                        ) from None
                    time.sleep(0.01)
            yield
        finally:
            os.close(handle)
