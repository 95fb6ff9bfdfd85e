"""Routes of a worklist's volumes, and of slices to draw on."""

import contextlib
import os
import shutil
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated

import numpy as np
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from numpy.typing import NDArray

from vessa.errors import InvalidRequest, TooLarge, UnknownJob, VessaError
from vessa.file_kinds import HEAD, kind_of
from vessa.schemas import JobInfo
from vessa.volumes import isolated
from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.api.console.worklists import ListName, StoreDep
from vessa_server.api.dependencies import READ, ChangeDep, limits_of, service_of
from vessa_server.api.jobs import jobs_of, receive_files, start_job
from vessa_server.api.openapi import SLICES_BODY, WORKLIST_VOLUME_BODY, answering
from vessa_server.serialization.fields import read_group
from vessa_server.serialization.image_files import decode_image
from vessa_server.serialization.job_request import JobRequest
from vessa_server.serialization.responses import notes_header
from vessa_server.settings import Settings
from vessa_server.volume_jobs.jobs import Jobs
from vessa_server.worklists.records import StoredVolume, Worklist
from vessa_server.worklists.schemas import TakenLabels, VolumeInfo, volume_info
from vessa_server.worklists.store import WorklistStore
from vessa_server.worklists.volumes import (
    add_volume,
    files_of,
    get_volume,
    remove_volume,
    set_job,
    shown_nifti,
    take_labels,
)

worklist_volumes = APIRouter(dependencies=[Depends(require_key)])

VolumeId = Annotated[str, Path(description="volume of the worklist", max_length=32)]
_BYTES = _NIFTI = "application/octet-stream"


@worklist_volumes.post(
    "/slices", response_class=Response, responses=answering(_BYTES), openapi_extra=SLICES_BODY
)
async def slices(request: Request, caller: CallerDep) -> Response:
    """Decode a picture, or the files of one volume, into slices as they are shown; nothing is stored.

    The body is uint8, slice by slice and row by row; X-Shape holds S,H,W of gray or S,H,W,3 of RGB slices.
    """
    jobs = jobs_of(request)
    with (
        limits_of(request).work(caller),
        service_of(request).permit() as engine,
        jobs.upload(caller) as folder,
    ):
        _, files = await receive_files(request, folder, engine.settings, {"image"})
        read = partial(_slices, files, jobs, engine.settings)
        stack, notes = await run_sync(read, limiter=jobs.reading)
    headers = {"X-Shape": ",".join(map(str, stack.shape)), "Cache-Control": "no-store", **notes_header(notes)}
    return Response(stack.tobytes(), media_type=_BYTES, headers=headers)


@worklist_volumes.post("/worklists/{name}/volumes", status_code=201, openapi_extra=WORKLIST_VOLUME_BODY)
async def add(
    name: ListName, request: Request, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> VolumeInfo:
    """Add a volume: one NIfTI file, one DICOM file, or the files of one series. Each slice is an item."""
    jobs = jobs_of(request)
    with (
        limits_of(request).work(caller),
        service_of(request).permit() as engine,
        jobs.upload(caller) as folder,
    ):
        worklist = await run_in_threadpool(store.get, name, caller)
        form, files = await receive_files(request, folder, engine.settings, {"image", "name", "group"})
        shown, group = form.text("name", "volume")[:160], form.text("group", "")
        group = read_group(group, "group") if group else ""
        async with contextmanager_in_threadpool(change("worklist.volume", worklist=name)) as more:
            create = partial(add_volume, store, worklist, files, shown, group, jobs.bounds)
            volume = await run_sync(create, limiter=jobs.reading)
            more["volume"] = volume.id
    return volume_info(volume)


@worklist_volumes.post("/worklists/{name}/volumes/{volume}/job", status_code=202)
async def segment_volume(
    name: ListName, volume: VolumeId, request: Request, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> JobInfo:
    """Segment a volume of the worklist as a job, or return its job; GET /jobs/ID has the progress."""
    jobs = jobs_of(request)
    with limits_of(request).work(caller), service_of(request).permit() as engine:
        worklist = await run_in_threadpool(store.get, name, caller)
        stored = await run_in_threadpool(get_volume, store, worklist, volume)
        if stored.job:
            with contextlib.suppress(UnknownJob):  # it was cancelled, or is too old
                info = jobs.info(stored.job, caller)
                if info.state != "failed":
                    return info
                jobs.cancel(stored.job, caller)
        with jobs.upload(caller) as folder:
            files = await run_in_threadpool(_copies, store, worklist, stored, folder)
            wanted = JobRequest(worklist.bank, group=stored.group or None, kind="nifti")
            info = await start_job(request, engine, folder, files, wanted, caller, change)
        await run_in_threadpool(set_job, store, worklist, stored, info.id)
    return info


@worklist_volumes.post("/worklists/{name}/volumes/{volume}/labels")
def take_job_labels(
    name: ListName, volume: VolumeId, request: Request, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> TakenLabels:
    """Give the slices the labels of the volume's finished job, and delete the job.

    Slices that were decided or edited meanwhile keep their own labels. 409 job_unfinished before its end.
    """
    jobs, worklist = jobs_of(request), store.get(name, caller)
    stored = get_volume(store, worklist, volume)
    if not stored.job:
        raise InvalidRequest("no job segments this volume; POST .../job starts one")
    # A place: requests that wait for a process that reads volumes must not hold all threads.
    with limits_of(request).work(caller):
        try:
            _, data = jobs.result(stored.job, caller)
        except VessaError as error:
            if error.code != "job_unfinished":
                set_job(store, worklist, stored, "")  # it failed or is gone: another one can be started
            raise
        labels = isolated.read_volume([data], jobs.bounds).voxels.astype(np.uint8)
        with change("worklist.labels", worklist=name, volume=volume, job=stored.job):
            taken = take_labels(
                store, worklist, stored, labels,
                jobs.provenance(stored.job, caller), jobs.doubts(stored.job, caller),
            )  # fmt: skip
            set_job(store, worklist, stored, "")
            jobs.cancel(stored.job, caller)
    return TakenLabels(taken=taken, kept=stored.slices - taken)


@worklist_volumes.delete("/worklists/{name}/volumes/{volume}", status_code=204)
def delete_volume(
    name: ListName, volume: VolumeId, request: Request, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> None:
    """Remove a volume with its slices, labels and job."""
    worklist = store.get(name, caller)
    with change("worklist.remove", worklist=name, volume=volume):
        job = remove_volume(store, worklist, volume)
        if job:
            with contextlib.suppress(UnknownJob):  # it is gone already
                jobs_of(request).cancel(job, caller)


@worklist_volumes.get(
    "/worklists/{name}/volumes/{volume}/image.nii",
    response_class=Response,
    responses=answering(_NIFTI),
    dependencies=READ,
)
def volume_image(name: ListName, volume: VolumeId, store: StoreDep, caller: CallerDep) -> Response:
    """The slices as they are shown, as one NIfTI file."""
    return _nifti(store, store.get(name, caller), volume, labels=False)


@worklist_volumes.get(
    "/worklists/{name}/volumes/{volume}/labels.nii",
    response_class=Response,
    responses=answering(_NIFTI),
    dependencies=READ,
)
def volume_labels(name: ListName, volume: VolumeId, store: StoreDep, caller: CallerDep) -> Response:
    """The newest labels of all slices as one NIfTI file; the export holds accepted ones alone."""
    return _nifti(store, store.get(name, caller), volume, labels=True)


def _nifti(store: WorklistStore, worklist: Worklist, volume: str, labels: bool) -> Response:
    data = shown_nifti(store, worklist, get_volume(store, worklist, volume), labels)
    return Response(data, media_type=_NIFTI, headers={"Cache-Control": "no-store"})


def _slices(files: list[FilePath], jobs: Jobs, settings: Settings) -> tuple[NDArray[np.uint8], list[str]]:
    if not files:
        raise InvalidRequest("The form needs the file 'image'. Add it.")
    with files[0].open("rb") as file:
        kind = kind_of(file.read(HEAD))
    if kind in ("PNG", "JPEG", "TIFF"):
        notes: list[str] = []
        return decode_image(files[0].read_bytes(), settings.limits.max_pixels, notes)[None], notes
    volume = isolated.read_volume(files, jobs.bounds)
    axis = volume.axis()
    size = int(np.prod(volume.voxels.shape))
    if size > settings.limits.max_answer_bytes:
        raise TooLarge(
            f"the slices take {size} bytes, more than {settings.limits.max_answer_bytes}. Cut out a part of "
            "the volume, or raise VESSA_MAX_ANSWER_BYTES"
        )
    return np.stack([volume.image(axis, i) for i in range(volume.shape[axis])]), list(volume.notes)


def _copies(
    store: WorklistStore, worklist: Worklist, volume: StoredVolume, folder: FilePath
) -> list[FilePath]:
    """Link the stored files into the folder of an upload: they are never changed, so no bytes are copied."""
    copies = []
    for path in files_of(store, worklist, volume):
        copy = folder / path.name
        try:
            os.link(path, copy)
        except OSError:  # another file system
            shutil.copyfile(path, copy)
        copies.append(copy)
    return copies
