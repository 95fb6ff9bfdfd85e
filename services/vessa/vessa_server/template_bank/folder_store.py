"""Keep template banks in a folder."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from vessa import atomic_write
from vessa.errors import StoreUnavailable
from vessa_server.storage.files import RETRY_AFTER_S, disk
from vessa_server.template_bank.index import Edit, Index, checked_blob, named_blobs

LOCK_WAIT_S = 20.0


class FolderStore:
    """Keeps each bank in `<folder>/<bank>/`: `index.json` and `blobs/<sha256>.safetensors`.

    Files are written beside their place, synced and renamed. One lock file orders the writers, of this
    process and of others; readers need no lock.
    """

    def __init__(self, folder: Path | str) -> None:
        """Create the folder if needed; StoreUnavailable when that fails."""
        self.folder = Path(folder).expanduser()
        self._versions: dict[str, tuple[tuple[int, int, int], int]] = {}
        with disk("opened"):
            self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Return the existing banks, sorted."""
        with disk("read"):
            found = sorted(path.parent.name for path in self.folder.glob("*/index.json"))
        return [name for name in found if self.read(name).exists]

    def version(self, bank: str) -> int:
        """Return the bank's version; reads the file only when it was replaced."""
        with disk("read"):
            try:
                stat = (self.folder / bank / "index.json").stat()
            except FileNotFoundError:
                return 0
        signature = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        known = self._versions.get(bank)
        if known is None or known[0] != signature:
            # Should the file be replaced in between, the old signature makes the next call read again.
            known = self._versions[bank] = (signature, self.read(bank).version)
        return known[1]

    def read(self, bank: str) -> Index:
        """Return the bank's index."""
        with disk("read"):
            try:
                return Index.from_json((self.folder / bank / "index.json").read_bytes())
            except FileNotFoundError:
                return Index()

    def blob(self, bank: str, digest: str) -> bytes | None:
        """Return a blob, or None when it is missing or damaged."""
        with disk("read"):
            try:
                data = self._blob_path(bank, digest).read_bytes()
            except FileNotFoundError:
                data = None
        return checked_blob(bank, digest, data)

    def change(self, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        """Apply `edit` under the lock: blobs first, then the index, then what no index names is removed."""
        with self._locked():
            old = self.read(bank)
            wanted = edit(old)
            if wanted is None:
                return old
            new = replace(wanted, version=old.version + 1)
            with disk("written"):
                (self.folder / bank / "blobs").mkdir(parents=True, exist_ok=True)
                for digest, data in named_blobs(blobs, new).items():
                    atomic_write.write_bytes(self._blob_path(bank, digest), data)
                atomic_write.write_bytes(self.folder / bank / "index.json", new.to_json())
                self._sweep(bank, new)
            return new

    def _blob_path(self, bank: str, digest: str) -> Path:
        return self.folder / bank / "blobs" / f"{digest}.safetensors"

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
                            "another process holds the template store's lock", retry_after=RETRY_AFTER_S
                        ) from None
                    time.sleep(0.01)
            yield
        finally:
            os.close(handle)
