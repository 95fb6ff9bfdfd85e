"""Work on volume jobs in the background, a few slices of each key in turn. No HTTP here.

One thread segments up to one batch of slices of one job, then of a job of the key that waits longest. Slices
wait in the batch queue under a client of their own, so that single images take turns with them. Of several
services that share the folder, one works at a time.
"""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vessa import atomic_write
from vessa.errors import (
    ClassConflict,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    Retryable,
    Unauthorized,
    VessaError,
)
from vessa.masks.cleaning import NEIGHBOR_WEIGHT
from vessa.volumes import Bounds, isolated, write_labels
from vessa_server.auth.keys import Caller, Role
from vessa_server.serialization.request_parser import SegmentRequest
from vessa_server.serving.engine import Engine
from vessa_server.serving.label_cleaning import clean_stack
from vessa_server.serving.lifecycle import Service
from vessa_server.settings import Settings
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.volume_jobs.slices import (
    assemble,
    check_inputs,
    finished_slices,
    read_confidence,
    read_images,
    read_stack,
    write_slice,
)
from vessa_server.volume_jobs.store import Job, JobStore, alone_on

log = logging.getLogger(__name__)

_BEAT_S = 0.5
_FULL_S = 2.0
_IDLE_S = 5.0


class JobRunner:
    """Run the thread that works on the jobs of a store."""

    def __init__(
        self,
        settings: Settings,
        service: Service,
        store: JobStore,
        bounds: Bounds,
        caller_of: Callable[[str], Caller | None],
    ) -> None:
        """Prepare the thread; `start` begins. caller_of: see `Jobs`."""
        self._settings, self._service, self._store = settings, service, store
        self._bounds, self._caller_of = bounds, caller_of
        self._stopping, self._news = threading.Event(), threading.Event()
        self._served: dict[str, float] = {}  # owner -> when a job of it had its last turn
        self._checked: dict[str, set[int]] = {}  # job -> slices that are finished and were checked
        self._thread = threading.Thread(target=self._run, name="vessa-jobs", daemon=True)

    @property
    def alive(self) -> bool:
        """Return whether the thread runs, or has not been started yet."""
        return self._thread.is_alive() or self._thread.ident is None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Stop the thread after the slices in progress, waiting at most `seconds`."""
        self._stopping.set()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def wake(self) -> None:
        """Tell the thread that there is a new job."""
        self._news.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
            except OSError as error:  # such as a full disk: the job continues when there is room
                log.warning("volume jobs wait: %s", error.strerror)
                self._stopping.wait(_FULL_S)
            except Exception:  # a fault of one turn must not end all jobs
                log.exception("a turn of the volume jobs failed; the next one follows")
                self._stopping.wait(_FULL_S)

    def _turn(self) -> None:
        if self._next() is None:
            self._news.wait(_IDLE_S)
            self._news.clear()
            return
        with alone_on(self._store.folder) as alone:
            job = self._next() if alone else None
            if job is not None:
                self._served[job.owner] = time.monotonic()
                self._step(job)
        if not alone:
            self._stopping.wait(_BEAT_S)

    def _next(self) -> Job | None:
        """Return the oldest job of the owner whose last turn is longest ago."""
        waiting: dict[str, Job] = {}
        for job in self._store.all():
            if not job.finished:
                waiting.setdefault(job.owner, job)
        if not waiting:
            return None
        return waiting[min(waiting, key=lambda owner: (self._served.get(owner, 0.0), waiting[owner].created))]

    def _step(self, job: Job) -> None:
        """Work on a few slices of a job, or finish it; a failure ends this job alone."""
        try:
            self._work(job if job.state == "running" else self._store.change(job, state="running"))
        except FileNotFoundError:
            if self._store.path(job).is_dir():
                message = "Files of the job are missing. Send the volume again."
                self._end(job, state="failed", error=(InternalError.code, message))
            else:
                log.info("job %s was deleted while it ran", job.id)
        except OSError:
            raise  # a fault of the disk and not of the job: `_run` waits for room
        except VessaError as error:
            if isinstance(error, Retryable) and not isinstance(error, DeadlineExceeded):
                self._stopping.wait(_BEAT_S)  # the job stays queued
            else:  # a slice that takes too long once takes too long again
                self._end(job, state="failed", error=(error.code, str(error)))
        except Exception:
            log.exception("job %s failed", job.id)
            message = "The service failed on this job. Its log names the cause."
            self._end(job, state="failed", error=(InternalError.code, message))

    def _work(self, job: Job) -> None:
        engine = self._service.engine()
        reader = engine.reader.for_caller(CallersBanks(engine.banks, self._caller(job)))
        folder = self._store.path(job)
        if job.id not in self._checked:
            check_inputs(folder, job)
            self._checked[job.id] = finished_slices(folder, job)
        missing = [i for i in range(job.slices) if i not in self._checked[job.id]]
        if not missing:
            self._finish(job, engine)
            return
        height, width = job.size
        step = max(1, self._settings.limits.max_answer_bytes // (2 * height * width))
        places = missing[: min(step, self._settings.queue.max_batch, self._settings.limits.max_items)]
        images = read_images(folder, places)
        request = reader.segment_slices(job.bank, list(job.classes.values()), images, job.group)
        if request.classes != job.classes:
            raise ClassConflict(f"The classes of bank {job.bank!r} changed while the job ran. Send it again.")
        answers = asyncio.run(engine.annotate(request, f"job of {job.owner}", deadline=False))
        self._store_slices(job, folder, places, request, answers, engine)

    def _store_slices(
        self,
        job: Job,
        folder: Path,
        places: Sequence[int],
        request: SegmentRequest,
        answers: Sequence[Any],
        engine: Engine,
    ) -> None:
        for place, item, answer in zip(places, request.items, answers, strict=True):
            if isinstance(answer, VessaError):
                answer.item = place
                raise answer
            assert not isinstance(item, VessaError)  # its answer would be the same error
            made = engine.annotations.provenance(request, item, answer)
            sure = answer.confidence if job.clean else None
            write_slice(folder, place, answer.labels, made, answer.doubt, sure)
            self._checked[job.id].add(place)

    def _caller(self, job: Job) -> Caller:
        """Return the owner with its role of today. Raises Unauthorized or Forbidden."""
        caller = self._caller_of(job.owner)
        if caller is None:
            raise Unauthorized(f"Key {job.owner!r}, which sent this job, was revoked.")
        if caller.role < Role.annotate:
            raise Forbidden(f"Key {job.owner!r}, which sent this job, may no longer annotate.")
        return caller

    def _finish(self, job: Job, engine: Engine) -> None:
        folder = self._store.path(job)
        files = [folder / f"{i:05d}.input" for i in range(len(job.files))]
        volume = isolated.read_volume(files, self._bounds)
        stack, cleaning = read_stack(job, folder), None
        if job.clean:
            bank = CallersBanks(engine.banks, self._caller(job)).get(job.bank)
            cleaned, cleaning = clean_stack(
                stack,
                read_confidence(job, folder),
                bank,
                job.classes,
                neighbor_weight=NEIGHBOR_WEIGHT,
            )
            stack = cleaned.labels
        labels = assemble(volume, job, stack)
        data = write_labels(volume, labels, job.classes, engine.info.model[:16], job.kind)
        atomic_write.write_bytes(folder / "result", data, 0o600)
        self._end(job, state="done", result=hashlib.sha256(data).hexdigest(), cleaning=cleaning)

    def _end(self, job: Job, **changes: Any) -> None:
        """Store the outcome and remove the inputs."""
        self._checked.pop(job.id, None)
        # The end is never before the start, whatever the clock does in between.
        try:
            self._store.change(job, ended=max(time.time(), job.created), **changes)
        except FileNotFoundError:
            return  # deleted
        self._store.remove_inputs(job)
