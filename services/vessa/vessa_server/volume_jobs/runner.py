"""Volumes that are segmented slice by slice in the background, kept on disk across a restart. No HTTP here.

One thread works on one job after another; its slices wait in the device queue like everybody's, under a
client of their own, so that single images take turns with them. Of several services that share the folder one
works at a time.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from anyio import CapacityLimiter
from numpy.typing import NDArray

from vessa import atomic_write
from vessa.errors import (
    ClassConflict,
    DeadlineExceeded,
    InternalError,
    JobUnfinished,
    NotReady,
    QueueFull,
    Retryable,
    StoreUnavailable,
    TooLarge,
    UnknownJob,
    VessaError,
    error_from,
)
from vessa.schemas import JobInfo, Provenance
from vessa.volumes import Bounds, Volume, check_dicom_seg, isolated, write_labels
from vessa.volumes.grid import slice_of
from vessa_server.auth.keys import Caller, Role
from vessa_server.serialization.image_files import decode_mask, label_png
from vessa_server.serialization.job_request import JobRequest, ResultKind
from vessa_server.serialization.request_parser import SegmentRequest
from vessa_server.serving.annotation_cache import AnnotationCache
from vessa_server.serving.engine import Engine
from vessa_server.serving.lifecycle import Service
from vessa_server.settings import Settings
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.volume_jobs.store import Job, alone_on, folder_of, read_job, remove, size_of

log = logging.getLogger(__name__)

_BEAT_S = 0.5
_FULL_S = 2.0
_UPLOAD_S = 3600.0  # an upload that is older was cut off by a kill


class Jobs:
    """All jobs of a service; `start` takes up what a stopped one left."""

    def __init__(self, settings: Settings, service: Service) -> None:
        """Open the folder; nothing runs yet."""
        self._settings, self._service = settings, service
        self._folder = folder_of(settings)
        self._lock = threading.Lock()
        self.reading = CapacityLimiter(1)  # a small file may be a volume of gigabytes: `create` one at a time
        self._stopping, self._news = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="vessa-jobs", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Leave the job at hand after its slices in work; it goes on when the service starts again."""
        self._stopping.set()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def create(
        self,
        files: Sequence[bytes],
        request: JobRequest,
        caller: Caller,
        engine: Engine,
        take: Callable[[int], None],
    ) -> JobInfo:
        """Check a volume and keep it as a job; InvalidImage, TooLarge, QueueFull, what the bank refuses.

        take: counts the slices before anything is kept, and may refuse them
        """
        volume = isolated.read_volume(files, self._bounds)
        axis = volume.axis(request.axis)
        most = self._settings.jobs.max_job_slices
        if volume.shape[axis] > most:
            raise TooLarge(f"the volume has {volume.shape[axis]} slices along this axis, more than {most}")
        reader = replace(engine.reader, banks=CallersBanks(engine.banks, caller))
        asked = reader.segment_slices(
            request.bank, request.classes, volume.image(axis, 0)[None], request.group
        )
        kind: ResultKind = request.kind or ("dicom-seg" if volume.headers else "nifti")
        job = Job(
            id=secrets.token_hex(12),
            owner=caller.name,
            role=int(caller.role),
            bank=request.bank,
            classes=asked.classes,
            group=request.group,
            axis=axis,
            kind=kind,
            slices=volume.shape[axis],
            files=len(files),
            created=time.time(),
            notes=volume.notes,
        )
        if kind == "dicom-seg":
            check_dicom_seg(volume)  # now, while the caller is there to read why
        with self._lock:
            folder = self._folder / f".{job.id}"
            try:
                self._make_place(sum(map(len, files)), caller)
                take(job.slices)
                folder.mkdir(parents=True, mode=0o700)
                for index, data in enumerate(files):
                    (folder / f"{index:05d}.input").write_bytes(data)
                atomic_write.write_bytes(folder / "job.json", json.dumps(asdict(job)).encode())
                folder.rename(self._path(job))  # whole or not at all
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise StoreUnavailable(
                    f"the job could not be kept: {error.strerror}", retry_after=30.0
                ) from error
        self._news.set()
        return self._info(job)

    def visible(self, caller: Caller) -> list[JobInfo]:
        """Return the caller's jobs, the oldest first; an admin's are all."""
        return [self._info(job) for job in self._all() if _may(caller, job)]

    def info(self, identity: str, caller: Caller) -> JobInfo:
        """Return how a job goes; UnknownJob also for another key's."""
        return self._info(self._get(identity, caller))

    def cancel(self, identity: str, caller: Caller) -> None:
        """Stop a job and delete all of it."""
        job = self._get(identity, caller)
        with self._lock:
            remove(self._path(job))

    def result(self, identity: str, caller: Caller) -> tuple[ResultKind, bytes]:
        """Return a finished job's file; JobUnfinished, or the error that ended it."""
        job = self._get(identity, caller)
        if job.error is not None:
            raise error_from(*job.error)
        if job.state != "done":
            info = self._info(job)
            raise JobUnfinished(
                f"the job has {info.done} of {info.slices} slices; ask again later", retry_after=2.0
            )
        try:
            return job.kind, (self._path(job) / "result").read_bytes()
        except OSError:
            raise UnknownJob(f"there is no job {identity[:40]!r}") from None

    def provenance(self, identity: str, caller: Caller) -> list[Provenance]:
        """Return what made each of the slices that are done, in their order."""
        paths = sorted(self._path(self._get(identity, caller)).glob("*.made"))
        try:
            return [Provenance.model_validate_json(path.read_bytes()) for path in paths]
        except OSError:
            raise UnknownJob(f"there is no job {identity[:40]!r}") from None

    @property
    def _bounds(self) -> Bounds:
        settings = self._settings
        return Bounds(settings.jobs.max_job_voxels, settings.limits.max_pixels, settings.jobs.max_job_slices)

    def _path(self, job: Job) -> Path:
        return self._folder / job.id

    def _all(self) -> list[Job]:
        found = (read_job(path) for path in sorted(self._folder.glob("[!.]*/job.json")))
        return sorted((job for job in found if job is not None), key=lambda job: (job.created, job.id))

    def _get(self, identity: str, caller: Caller) -> Job:
        job = next((job for job in self._all() if job.id == identity and _may(caller, job)), None)
        if job is None:
            raise UnknownJob(f"there is no job {identity[:40]!r}")
        return job

    def _info(self, job: Job) -> JobInfo:
        done = job.slices if job.state == "done" else len(list(self._path(job).glob("*.png")))
        message = None if job.error is None else job.error[1]
        return JobInfo(
            id=job.id,
            state=job.state,
            bank=job.bank,
            slices=job.slices,
            done=done,
            result=job.kind,
            error=message,
            notes=list(job.notes),
        )

    def _make_place(self, size: int, caller: Caller) -> None:
        """Forget what is over its age; QueueFull when too many jobs or bytes, or of one key, are left."""
        bounds = self._settings.jobs
        oldest = time.time() - bounds.job_age_s
        for left in self._folder.glob(".*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _UPLOAD_S:
                    shutil.rmtree(left, ignore_errors=True)
        for job in self._all():
            if job.finished and job.ended < oldest:
                remove(self._path(job))
        kept, held = self._all(), size_of(self._folder)
        own = sum(job.owner == caller.name for job in kept)
        share = max(1, bounds.max_jobs * 3 // 4)  # a key that forgets its results leaves places for others
        if len(kept) >= bounds.max_jobs or own >= share or held + size > bounds.max_jobs_bytes:
            raise QueueFull(
                f"Job storage is full: {len(kept)} of {bounds.max_jobs} jobs and {held} of "
                f"{bounds.max_jobs_bytes} bytes, {own} of {share} jobs of this key. Delete finished jobs "
                "(DELETE /jobs/ID) or retry later.",
                retry_after=30.0,
            )

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
            except OSError as error:  # such as a full disk: the job goes on when there is room
                log.warning("jobs wait: %s", error.strerror)
                self._stopping.wait(_FULL_S)

    def _turn(self) -> None:
        if self._next() is None:
            self._news.wait(5.0)
            self._news.clear()
            return
        with alone_on(self._folder) as alone:
            job = self._next() if alone else None
            if job is not None:
                self._try(job)
        if not alone:
            self._stopping.wait(_BEAT_S)

    def _next(self) -> Job | None:
        return next((job for job in self._all() if not job.finished), None)

    def _try(self, job: Job) -> None:
        try:
            self._work(self._change(job, state="running"))
        except FileNotFoundError:
            if self._path(job).is_dir():
                told = "files of the job are missing; send the volume again"
                self._end(job, state="failed", error=(InternalError.code, told))
            else:
                log.info("job %s was deleted while it ran", job.id)
        except OSError:
            raise  # the disk's fault and not the job's: `_run` waits for room
        except VessaError as error:
            if isinstance(error, Retryable) and not isinstance(error, DeadlineExceeded):
                self._stopping.wait(_BEAT_S)  # the job stays the next one
            else:  # a slice that takes too long once takes too long again
                self._end(job, state="failed", error=(error.code, str(error)))
        except Exception:
            log.exception("job %s failed", job.id)
            self._end(job, state="failed", error=(InternalError.code, "the service's log says why"))

    def _work(self, job: Job) -> None:
        engine = self._service.engine()
        folder = self._path(job)
        # the bytes first: what goes wrong then is the disk's fault and not the file's
        files = [(folder / f"{i:05d}.input").read_bytes() for i in range(job.files)]
        volume = isolated.read_volume(files, self._bounds)
        caller = Caller(job.owner, Role(job.role))
        reader = replace(engine.reader, banks=CallersBanks(engine.banks, caller))
        missing = [i for i in range(job.slices) if not (folder / f"{i:05d}.png").exists()]
        height, width = volume.image(job.axis, 0).shape
        step = max(1, self._settings.limits.max_answer_bytes // (2 * height * width))
        step = min(step, self._settings.queue.max_batch, self._settings.limits.max_items)
        for start in range(0, len(missing), step):
            if self._stopping.is_set():
                raise NotReady("the service is shutting down")
            places = missing[start : start + step]
            images = np.stack([volume.image(job.axis, i) for i in places])
            request = reader.segment_slices(job.bank, list(job.classes.values()), images, job.group)
            if request.classes != job.classes:
                raise ClassConflict(f"the classes of bank {job.bank!r} were changed while the job ran")
            answers = asyncio.run(engine.annotate(request, f"job of {job.owner}", deadline=False))
            _keep(folder, places, request, answers, engine.annotations)
        labels = _assemble(volume, job, folder)
        source = f"{engine.info.model[:16]}"
        self._finish(job, write_labels(volume, labels, job.classes, source, job.kind))

    def _finish(self, job: Job, data: bytes) -> None:
        atomic_write.write_bytes(self._path(job) / "result", data)
        self._end(job, state="done")

    def _end(self, job: Job, **changes: Any) -> None:
        """Keep the outcome; what it was made of is needed no more."""
        try:
            self._change(job, ended=time.time(), **changes)
        except FileNotFoundError:
            return  # deleted meanwhile
        for pattern in ("*.input", "*.png"):
            for path in self._path(job).glob(pattern):
                path.unlink(missing_ok=True)

    def _change(self, job: Job, **changes: Any) -> Job:
        changed = replace(job, **changes)
        with self._lock:
            atomic_write.write_bytes(self._path(job) / "job.json", json.dumps(asdict(changed)).encode())
        return changed


def _may(caller: Caller, job: Job) -> bool:
    return caller.role is Role.admin or caller.name == job.owner


def _keep(
    folder: Path,
    places: Sequence[int],
    request: SegmentRequest,
    answers: Sequence[Any],
    annotations: AnnotationCache,
) -> None:
    for place, item, answer in zip(places, request.items, answers, strict=True):
        if isinstance(answer, VessaError):
            answer.item = place
            raise answer
        assert not isinstance(item, VessaError)  # its answer would be the same error
        made = annotations.provenance(request, item, answer)
        atomic_write.write_bytes(folder / f"{place:05d}.made", made.model_dump_json().encode())
        atomic_write.write_bytes(folder / f"{place:05d}.png", label_png(answer.labels))


def _assemble(volume: Volume, job: Job, folder: Path) -> NDArray[np.uint8]:
    labels = np.zeros(volume.shape, np.uint8)
    for index in range(job.slices):
        part = slice_of(labels, job.axis, index)
        size = (part.shape[0], part.shape[1])
        part[...] = decode_mask((folder / f"{index:05d}.png").read_bytes(), size, part.size)
    return labels
