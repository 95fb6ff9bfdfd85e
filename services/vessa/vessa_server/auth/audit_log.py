"""Record who changed what, when and from where, in an append-only log of JSON lines.

A change is recorded before it is made, synced to the disk, and its outcome after: a change that cannot be
recorded is not made. Each line holds its sequence number and the hash of the line before, so that `verify`
finds lines that were changed, removed or inserted. No image content, no keys. Files have mode 0600. They are
rotated by size; an old file is removed only when it is beyond the number and the age that are to be stored.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vessa.atomic_write import write_bytes
from vessa.errors import VessaError
from vessa_server.settings import DAY_S, Settings, default_store
from vessa_server.storage.disk_reserve import DiskReserve
from vessa_server.storage.files import disk, make_private

_LONGEST = 80  # characters of what a caller names: long names must not push others' lines out
_DELETIONS = (
    "bank.delete",
    "bank.unshare",
    "bank.adapt.forget",
    "template.remove",
    "job.delete",
    "key.revoke",
    "worklist.delete",
    "worklist.remove",
    "erase",
)
GENESIS = "0" * 64


@dataclass(frozen=True)
class Actor:
    """Name who makes a change. key: its name; source: address of the client; request: id of the request."""

    key: str
    source: str
    request: str


@dataclass(frozen=True)
class AuditLog:
    """Append to the log. most_bytes: of one file; most_files, most_days: stored files and their age."""

    path: Path
    most_bytes: int
    most_files: int
    most_days: float = 90.0

    @contextlib.contextmanager
    def change(self, actor: Actor, action: str, **about: Any) -> Iterator[dict[str, Any]]:
        """Record a change, let it be made, record its outcome. Raises StoreUnavailable when that fails.

        about: names and ids of what is changed; entries of the dictionary that this yields go into the second
        line
        """
        who = {"key": actor.key, "source": actor.source, "request": actor.request}
        about = {name: v[:_LONGEST] if isinstance(v, str) else v for name, v in about.items()}
        line = {**who, "action": action, **about}
        self._append(line | {"state": "asked"})
        more: dict[str, Any] = {}
        try:
            yield more
        except BaseException as error:
            code = error.code if isinstance(error, VessaError) else type(error).__name__
            self._append(line | more | {"state": "failed", "error": code})
            raise
        self._append(line | more | {"state": "done"})

    def files(self) -> list[Path]:
        """Return the stored files, the oldest first."""
        rotated = [(int(p.suffix[1:]), p) for p in self.path.parent.glob(f"{self.path.name}.*")
                   if p.suffix[1:].isdigit()]  # fmt: skip
        current = [self.path] if self.path.exists() else []
        return [path for _, path in sorted(rotated, reverse=True)] + current

    def verify(self) -> tuple[int, list[str]]:
        """Check the chain of hashes over all stored files. Returns the number of lines and the faults."""
        faults: list[str] = []
        previous: str | None = None  # the lines before the oldest stored one are gone
        number, lines = 0, 0
        with disk("read"), self._locked():
            for path in self.files():
                for place, raw in enumerate(path.read_bytes().splitlines(), start=1):
                    lines += 1
                    where = f"{path.name}, line {place}"
                    try:
                        entry = json.loads(raw)
                        said, count = entry["previous"], int(entry["sequence"])
                    except (ValueError, KeyError, TypeError):
                        faults.append(f"{where}: no entry of the chain")
                        previous = None
                        continue
                    if previous is not None and (said != previous or count != number + 1):
                        faults.append(f"{where}: the line before it was changed, removed or inserted")
                    previous, number = _hash(raw), count
            head = self._head()
            if head is not None and lines and (number, previous) != head:
                faults.append(f"{self.path.name}: its last lines were changed or removed")
            if head is not None and not lines:
                faults.append(f"{self.path.name}: all its lines were removed")
        return lines, faults

    def _append(self, line: dict[str, Any]) -> None:
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        with disk("audited"):
            make_private(self.path.parent)
            reserve = DiskReserve(self.path.with_name(f".{self.path.name}.reserve"), 64 * 1024)
            with self._locked():
                number, previous = self._last()
                entry = {"time": when, "sequence": number + 1, "previous": previous, **line}
                data = (json.dumps(entry) + "\n").encode()

                def write() -> None:
                    self._rotate(len(data))
                    self._write(data, json.dumps({"sequence": number + 1, "hash": _hash(data[:-1])}))

                if line["action"] in _DELETIONS:
                    reserve.spend(write)
                else:
                    write()
                    reserve.fill()

    def _write(self, data: bytes, head: str) -> None:
        """Append a line and record it in the head file: both, or none."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "wb", buffering=0) as file:
            start = os.fstat(handle).st_size
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, "a line of the audit log was cut off")
                os.fsync(handle)
                write_bytes(self._head_path, head.encode(), 0o600, sync=False)
            except OSError:
                file.truncate(start)  # half a line would make the next one unreadable
                raise

    @property
    def _head_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.head")

    def _head(self) -> tuple[int, str] | None:
        """Return number and hash of the last line as they were recorded beside the log."""
        try:
            head = json.loads(self._head_path.read_bytes())
            return int(head["sequence"]), str(head["hash"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _last(self) -> tuple[int, str]:
        """Return the number and the hash of the last line; those before the first one of a new log."""
        files = [path for path in self.files() if path.stat().st_size]
        if not files:
            return self._head() or (0, GENESIS)
        with files[-1].open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            raw = file.read().splitlines()[-1]
        try:
            return int(json.loads(raw)["sequence"]), _hash(raw)
        except (ValueError, KeyError, TypeError):  # written before 0.2, or damaged: `verify` says so
            return (self._head() or (0, GENESIS))[0], _hash(raw)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        make_private(self.path.parent)
        lock = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the command line writes here too
            yield
        finally:
            os.close(lock)

    def _rotate(self, coming: int) -> None:
        """Start a new file when the current one is full; remove files beyond both number and age."""
        if not self.path.exists() or self.path.stat().st_size + coming <= self.most_bytes:
            return
        rotated = self.files()[:-1]  # the oldest first
        for path in rotated:
            path.replace(Path(f"{self.path}.{int(path.suffix[1:]) + 1}"))
        self.path.replace(Path(f"{self.path}.1"))
        oldest = time.time() - self.most_days * DAY_S
        for path in self.files():
            # Both bounds: within a busy hour, one key could push all history out by number alone.
            if int(path.suffix[1:]) >= self.most_files and path.stat().st_mtime < oldest:
                path.unlink()


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def open_audit(settings: Settings) -> AuditLog:
    """Open the audit log: `audit_file`, else beside a folder store's banks, else in the user's data."""
    scheme, _, place = settings.storage.store.partition(":")
    folder = Path(place).expanduser() if scheme == "folder" else Path(default_store().partition(":")[2])
    path = settings.audit.audit_file or folder / ".audit" / "audit.jsonl"  # no bank can be called that
    bounds = settings.audit
    return AuditLog(path, bounds.audit_bytes, bounds.audit_files, bounds.audit_days)
