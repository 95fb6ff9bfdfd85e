"""Create, list, cancel and answer volume jobs, within the limits of each key."""

import contextlib
import hashlib
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from anyio import CapacityLimiter

from vessa.errors import (
    InternalError,
    JobUnfinished,
    NotReady,
    QueueFull,
    StoreUnavailable,
    TooLarge,
    UnknownJob,
    error_from,
)
from vessa.schemas import JobInfo, Provenance
from vessa.volumes import Bounds, check_dicom_seg, isolated
from vessa_server.auth.keys import Caller, Role
from vessa_server.serialization.job_request import JobRequest, ResultKind
from vessa_server.serialization.request_parser import Reader
from vessa_server.serving.lifecycle import Service
from vessa_server.settings import Settings
from vessa_server.volume_jobs.runner import JobRunner
from vessa_server.volume_jobs.slices import IMAGES, read_doubts, read_provenance, write_images
from vessa_server.volume_jobs.store import Job, JobStore, digest_of_file, folder_of

log = logging.getLogger(__name__)

_UPLOADS = 4  # at once, and half of them by one key


class Jobs:
    """Manage all jobs of a service; `start` resumes what a stopped service left."""

    def __init__(
        self, settings: Settings, service: Service, caller_of: Callable[[str], Caller | None]
    ) -> None:
        """Open the folder; nothing runs yet.

        caller_of: returns the caller that a key's name stands for now, None when the key was revoked
        """
        self._settings = settings
        self.store = JobStore(folder_of(settings))
        self.bounds = Bounds(
            settings.jobs.max_job_voxels, settings.limits.max_pixels, settings.jobs.max_job_slices
        )
        self._runner = JobRunner(settings, service, self.store, self.bounds, caller_of)
        self._lock = threading.Lock()
        self._uploading: Counter[str] = Counter()
        self.reading = CapacityLimiter(1)  # a small file may be a volume of gigabytes: `create` one at a time

    def start(self) -> None:
        """Remove leftovers of a kill and begin to work."""
        self.store.sweep(self._settings.jobs.job_age_s)
        self._runner.start()

    def stop(self, seconds: float) -> None:
        """Stop after the slices in progress; the job resumes when the service starts again."""
        self._runner.stop(seconds)

    def check(self) -> None:
        """Raise NotReady when the thread that works on jobs has died."""
        if not self._runner.alive:
            raise NotReady(
                "The thread of volume jobs has died. Restart the service; its log names the cause.",
                retry_after=30.0,
            )

    @contextlib.contextmanager
    def upload(self, caller: Caller) -> Iterator[Path]:
        """Yield a hidden folder for uploaded files, removed afterwards unless `create` made it a job.

        Raises QueueFull when too many uploads are in progress.
        """
        with self._lock:
            own, all_ = self._uploading[caller.name], self._uploading.total()
            if all_ >= _UPLOADS or own >= _UPLOADS // 2:
                raise QueueFull(
                    f"{all_} of {_UPLOADS} uploads are in progress, {own} of {_UPLOADS // 2} of this key. "
                    "Retry when one has ended.",
                    retry_after=5.0,
                )
            self._uploading[caller.name] += 1
        try:
            with _disk_errors(), self.store.upload() as folder:
                yield folder
        finally:
            with self._lock:
                self._uploading[caller.name] -= 1

    def create(
        self,
        upload: Path,
        files: Sequence[Path],
        request: JobRequest,
        caller: Caller,
        reader: Reader,
        take: Callable[[int], None],
    ) -> JobInfo:
        """Check uploaded files and make them a job. They are on the disk when this returns.

        upload: folder of the files; take: counts the slices before the job is stored, and may refuse them.
        Raises InvalidImage, TooLarge, QueueFull, StoreUnavailable, and what the bank refuses.
        """
        with _disk_errors():
            digests = tuple(digest_of_file(path) for path in files)
        volume = isolated.read_volume(files, self.bounds)
        axis = volume.axis(request.axis)
        most = self._settings.jobs.max_job_slices
        if volume.shape[axis] > most:
            raise TooLarge(
                f"The volume has {volume.shape[axis]} slices along this axis, more than {most}. Send it in "
                "parts or choose another axis."
            )
        asked = reader.segment_slices(
            request.bank, request.classes, volume.image(axis, 0)[None], request.group
        )
        kind: ResultKind = request.kind or ("dicom-seg" if volume.headers else "nifti")
        if kind == "dicom-seg":
            check_dicom_seg(volume)  # now, while the caller is there to read why
        with _disk_errors():
            images = write_images(upload, volume, axis)
            height, width = volume.image(axis, 0).shape[:2]
            job = Job(
                id=secrets.token_hex(12),
                owner=caller.name,
                bank=request.bank,
                classes=asked.classes,
                group=request.group,
                axis=axis,
                kind=kind,
                size=(height, width),
                slices=volume.shape[axis],
                files=digests,
                images=images,
                created=time.time(),
                notes=volume.notes,
                clean=request.clean,
            )
            self._publish(upload, job, files, take)
        self._runner.wake()
        return self._info(job)

    def _publish(self, upload: Path, job: Job, files: Sequence[Path], take: Callable[[int], None]) -> None:
        with self._lock:
            size = sum(path.stat().st_size for path in (*files, upload / IMAGES))
            self._make_room(size, job.owner)
            take(job.slices)
            self.store.publish(upload, job)

    def visible(self, caller: Caller) -> list[JobInfo]:
        """Return the caller's jobs, the oldest first; an admin sees all."""
        return [self._info(job) for job in self.store.all() if _may(caller, job)]

    def info(self, identity: str, caller: Caller) -> JobInfo:
        """Return the state of a job. Raises UnknownJob, also for another key's."""
        return self._info(self._get(identity, caller))

    def cancel(self, identity: str, caller: Caller) -> None:
        """Stop a job and delete all of it; an admin also deletes damaged ones."""
        if caller.role is Role.admin and identity in self.store.damaged:
            self.store.remove(identity)
            return
        self.store.remove(self._get(identity, caller).id)

    def result(self, identity: str, caller: Caller) -> tuple[ResultKind, bytes]:
        """Return a finished job's file. Raises JobUnfinished, or the error that ended the job."""
        job = self._get(identity, caller)
        if job.error is not None:
            raise error_from(*job.error)
        if job.state != "done":
            info = self._info(job)
            raise JobUnfinished(
                f"The job has {info.done} of {info.slices} slices. Retry later.", retry_after=2.0
            )
        try:
            data = (self.store.path(job) / "result").read_bytes()
        except OSError:
            raise _unknown(identity) from None
        if hashlib.sha256(data).hexdigest() != job.result:
            log.error("job %s: its stored result is damaged", job.id)
            raise InternalError("The stored result of this job is damaged. Send the volume again.")
        return job.kind, data

    def provenance(self, identity: str, caller: Caller) -> list[Provenance]:
        """Return the provenance of each finished slice, in their order."""
        job = self._get(identity, caller)
        try:
            found = read_provenance(self.store.path(job))
            return [one.model_copy(update={"cleaning": job.cleaning}) for one in found]
        except OSError:
            raise _unknown(identity) from None
        except (ValueError, KeyError, TypeError):
            raise InternalError("The stored provenance of this job is damaged. Send it again.") from None

    def doubts(self, identity: str, caller: Caller) -> list[float]:
        """Return 1 - mean confidence of each finished slice, in their order."""
        try:
            return read_doubts(self.store.path(self._get(identity, caller)))
        except OSError:
            raise _unknown(identity) from None
        except (ValueError, KeyError, TypeError):
            raise InternalError("The stored confidence of this job is damaged. Send it again.") from None

    def _get(self, identity: str, caller: Caller) -> Job:
        job = next((job for job in self.store.all() if job.id == identity and _may(caller, job)), None)
        if job is None:
            raise _unknown(identity)
        return job

    def _info(self, job: Job) -> JobInfo:
        done = job.slices if job.state == "done" else len(list(self.store.path(job).glob("*.made")))
        return JobInfo(
            id=job.id,
            state=job.state,
            bank=job.bank,
            slices=job.slices,
            done=done,
            result=job.kind,
            error=None if job.error is None else job.error[1],
            notes=list(job.notes),
            cleaning=job.cleaning,
        )

    def _make_room(self, size: int, owner: str) -> None:
        """Remove jobs over their age. Raises QueueFull when jobs or bytes, of all or of one key, are full."""
        bounds = self._settings.jobs
        self.store.sweep(bounds.job_age_s)
        jobs, held = self.store.all(), self.store.bytes_by_owner()
        own, share = sum(job.owner == owner for job in jobs), max(1, int(bounds.max_jobs * bounds.job_share))
        key_bytes = int(bounds.max_jobs_bytes * bounds.job_share)
        uploading = held.pop("", 0)  # this upload too, which counts by its size
        used = held.total() + max(size, uploading)
        if (
            len(jobs) >= bounds.max_jobs
            or own >= share
            or used > bounds.max_jobs_bytes
            or held[owner] + size > key_bytes
        ):
            raise QueueFull(
                f"Job storage is full: {len(jobs)} of {bounds.max_jobs} jobs and {used} of "
                f"{bounds.max_jobs_bytes} bytes, of this key {own} of {share} jobs and "
                f"{held[owner] + size} of {key_bytes} bytes. Delete finished jobs (DELETE /jobs/ID) or retry "
                "later.",
                retry_after=30.0,
            )


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"The job could not be stored: {error.strerror}. Retry later.", retry_after=30.0
        ) from error


def _unknown(identity: str) -> UnknownJob:
    return UnknownJob(f"There is no job {identity[:40]!r}. GET /jobs lists them.")


def _may(caller: Caller, job: Job) -> bool:
    return caller.role is Role.admin or caller.name == job.owner
