"""Who changed what, when and from where: an append-only log of JSON lines, apart from the service's own.

A change is written down before it is made, synced to the disk, and how it went after: what cannot be written
down is not done. No image content, no keys. Files are of mode 0600, rotated by size, the oldest are dropped.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vessa.errors import VessaError
from vessa_server.settings import Settings, default_store
from vessa_server.storage.files import disk

_LONGEST = 80  # characters of what a caller names: nobody pushes others' lines out with long ones


@dataclass(frozen=True)
class Actor:
    """Who asks for a change. key: its name; source: address of the client; request: id of the request."""

    key: str
    source: str
    request: str


@dataclass(frozen=True)
class AuditLog:
    """The log. most_bytes: of one file; most_files: kept of them, the newest without a number."""

    path: Path
    most_bytes: int
    most_files: int

    @contextlib.contextmanager
    def change(self, actor: Actor, action: str, **about: Any) -> Iterator[dict[str, Any]]:
        """Write down a change, let it be made, write down how it went; StoreUnavailable where that fails.

        about: what is changed, by names and ids; what is put into the dictionary that this yields goes into
        the second line.
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
            self._append(line | {"state": "failed", "error": code})
            raise
        self._append(line | more | {"state": "done"})

    def _append(self, line: dict[str, Any]) -> None:
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        data = (json.dumps({"time": when, **line}) + "\n").encode()
        with disk("audited"):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the command line writes here too
                self._rotate(len(data))
                handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                with os.fdopen(handle, "wb", buffering=0) as file:
                    start = os.fstat(handle).st_size
                    try:
                        if file.write(data) != len(data):
                            raise OSError(28, "a line of the audit log was cut off")
                        os.fsync(handle)
                    except OSError:
                        file.truncate(start)  # half a line would make the next one unreadable
                        raise
            finally:
                os.close(lock)

    def _rotate(self, coming: int) -> None:
        if not self.path.exists() or self.path.stat().st_size + coming <= self.most_bytes:
            return
        names = [self.path, *(Path(f"{self.path}.{i}") for i in range(1, self.most_files))]
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)


def open_audit(settings: Settings) -> AuditLog:
    """Return the audit log: `audit_file`, else beside a folder store's banks, else in the user's data."""
    scheme, _, place = settings.storage.store.partition(":")
    folder = Path(place).expanduser() if scheme == "folder" else Path(default_store().partition(":")[2])
    path = settings.audit.audit_file or folder / ".audit" / "audit.jsonl"  # no bank can be called that
    return AuditLog(path, settings.audit.audit_bytes, settings.audit.audit_files)
