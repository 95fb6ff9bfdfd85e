"""What is kept of jobs on disk. No HTTP, no volumes here.

One folder a job: `job.json`, the files, for each finished slice a label map and what made it; in the end the
result in their place, and what made it. Names that begin with a dot are of uploads and of what is deleted.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vessa_server.serialization.job_request import ResultKind
from vessa_server.settings import Settings, default_store


@dataclass(frozen=True)
class Job:
    """What is kept of a job.

    classes: id and name of what is asked for; slices: along the axis; files: uploaded; ended: when it was
    finished, s since 1970, 0 before; error: (code, message) of a failure;
    notes: what was repaired in the files or is missing from them
    """

    id: str
    owner: str
    role: int
    bank: str
    classes: dict[int, str]
    group: str | None
    axis: int
    kind: ResultKind
    slices: int
    files: int
    created: float
    state: Literal["queued", "running", "done", "failed"] = "queued"
    ended: float = 0.0
    error: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("done", "failed")


def folder_of(settings: Settings) -> Path:
    """Return `jobs_folder`, else a folder beside a folder store's banks, else in the user's data."""
    scheme, _, place = settings.storage.store.partition(":")
    folder = Path(place).expanduser() if scheme == "folder" else Path(default_store().partition(":")[2])
    return settings.jobs.jobs_folder or folder / ".jobs"


@contextlib.contextmanager
def alone_on(folder: Path) -> Iterator[bool]:
    """Tell whether no other service works on the jobs of a folder; none begins before this ends."""
    handle = os.open(folder / "worker.lock", os.O_RDWR | os.O_CREAT, 0o600)
    alone = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def read_job(path: Path) -> Job | None:
    """Return a kept job; None when it was deleted, or when the file is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["classes"] = {int(key): name for key, name in values["classes"].items()}
        values["error"] = tuple(values["error"]) if values["error"] else None
        values["notes"] = tuple(values.get("notes", ()))
        return Job(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def remove(folder: Path) -> None:
    """Delete a job's folder: gone at once, whoever still writes to it, and not half there after a kill."""
    gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Return the bytes of the files in all jobs' folders, without those that go meanwhile."""
    held = 0
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            held += path.stat().st_size
    return held
