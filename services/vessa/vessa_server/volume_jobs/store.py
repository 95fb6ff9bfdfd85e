"""Store volume jobs on disk. No HTTP, no volumes here.

One folder per job, mode 0700: `job.json`, the uploaded files, `images.npy` with the slices, for each finished
slice a label map and its provenance; at the end the result instead of the inputs. Every file has a checksum
that is compared when it is read. Names that begin with a dot are uploads and what is being deleted.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vessa.atomic_write import write_bytes
from vessa.schemas import Cleaning
from vessa_server.serialization.job_request import ResultKind
from vessa_server.settings import DAY_S, Settings, default_store
from vessa_server.storage.files import close_to_others, make_private

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Describe a stored job.

    classes: name by id, of the requested classes; size: (H, W) of a slice, px; slices: along the axis; files:
    SHA-256 of each uploaded file; images: SHA-256 of the stored slices; result: SHA-256 of the result, empty
    before; created, ended: s since 1970, 0 before the end; error: (code, message) of a failure; notes: what
    was repaired in the files or is missing from them; clean: whether the volume's labels are cleaned at the
    end, and cleaning: what that did
    """

    id: str
    owner: str
    bank: str
    classes: dict[int, str]
    group: str | None
    axis: int
    kind: ResultKind
    size: tuple[int, int]
    slices: int
    files: tuple[str, ...]
    images: str
    created: float
    state: Literal["queued", "running", "done", "failed"] = "queued"
    ended: float = 0.0
    result: str = ""
    error: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()
    clean: bool = False
    cleaning: Cleaning | None = None

    @property
    def finished(self) -> bool:
        """Return whether nothing is left to do."""
        return self.state in ("done", "failed")


_JOB = TypeAdapter(Job)


class JobStore:
    """Read and write the jobs of one folder; safe to share between threads.

    damaged: name of a job's folder to the reason why it is skipped
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder; it is created by the first job."""
        self.folder = folder
        self.damaged: dict[str, str] = {}
        self._finished: dict[str, float] = {}  # job -> time.monotonic() when it was first seen finished

    def all(self) -> list[Job]:
        """Return the readable jobs, the oldest first; others are in `damaged` afterwards."""
        found: list[Job] = []
        damaged: dict[str, str] = {}
        for path in sorted(self.folder.glob("[!.]*/job.json")):
            try:
                found.append(_read(path))
            except FileNotFoundError:  # deleted
                continue
            except (OSError, ValueError) as error:
                damaged[path.parent.name] = f"job.json cannot be read: {error}"
                if path.parent.name not in self.damaged:
                    log.error("job %s is skipped: its job.json is damaged", path.parent.name)
        self.damaged = damaged
        now, finished = time.monotonic(), {job.id for job in found if job.finished}
        self._finished = {job: self._finished.get(job, now) for job in finished}
        return sorted(found, key=lambda job: (job.created, job.id))

    def path(self, job: Job) -> Path:
        """Return the folder of a job."""
        return self.folder / job.id

    @contextlib.contextmanager
    def upload(self) -> Iterator[Path]:
        """Yield a new hidden folder, removed afterwards unless `publish` renamed it.

        A lock on the folder shows other processes, and `sweep`, that it is in use.
        """
        make_private(self.folder)
        close_to_others(self.folder)
        folder = self.folder / f".{secrets.token_hex(12)}"
        folder.mkdir(mode=0o700)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)

    def publish(self, upload: Path, job: Job) -> None:
        """Make an upload a job: write `job.json`, sync every file and rename the folder."""
        for path in upload.iterdir():
            sync(path)
        write_bytes(upload / "job.json", _encode(job), 0o600)
        upload.rename(self.path(job))  # whole or not at all
        sync(self.folder)

    def change(self, job: Job, **changes: Any) -> Job:
        """Store a job with some fields changed. Raises FileNotFoundError when it was deleted."""
        changed = replace(job, **changes)
        write_bytes(self.path(job) / "job.json", _encode(changed), 0o600)
        return changed

    def remove_inputs(self, job: Job) -> None:
        """Remove all files of a finished job but its state, its result and the provenance of its slices."""
        for path in self.path(job).glob("*"):
            if path.name not in ("job.json", "result") and path.suffix != ".made":
                path.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a job's folder at once, whoever still writes to it, and completely even after a kill."""
        folder = self.folder / name
        gone = folder.with_name(f".{name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self, age_s: float) -> None:
        """Remove jobs that ended more than `age_s` ago, and what a kill left behind.

        The clock of the machine may jump: a job also needs to have been finished for `age_s`, or a day, by a
        clock that only counts.
        """
        for left in self.folder.glob(".*"):
            if not _in_use(left):
                shutil.rmtree(left, ignore_errors=True)
        for job in self.all():
            seen = time.monotonic() - self._finished.get(job.id, math.inf)
            if job.finished and time.time() - job.ended > age_s and seen >= min(age_s, DAY_S):
                self.remove(job.id)
            elif job.finished:  # a kill may have come between the outcome and this
                self.remove_inputs(job)

    def bytes_by_owner(self) -> Counter[str]:
        """Return the bytes on disk by the owner of the jobs; uploads count for the owner ""."""
        owners = {job.id: job.owner for job in self.all()}
        held: Counter[str] = Counter()
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):
                held[owners.get(path.parent.name, "")] += path.stat().st_size
        return held


def _in_use(folder: Path) -> bool:
    """Return whether a process holds the lock of an upload; the kernel drops that of a killed one."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def _encode(job: Job) -> bytes:
    body = json.dumps(_JOB.dump_python(job, mode="json"))
    return json.dumps({"job": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}).encode()


def _read(path: Path) -> Job:
    """Read a stored job. Raises ValueError when it is damaged, FileNotFoundError when it was deleted."""
    raw = json.loads(path.read_bytes())
    try:
        body = str(raw["job"])
        if hashlib.sha256(body.encode()).hexdigest() != raw["sha256"]:
            raise ValueError("its checksum does not match")
        job = _JOB.validate_json(body)
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError("it is no job") from error
    if job.id != path.parent.name:
        raise ValueError("it belongs to another job")
    return job
