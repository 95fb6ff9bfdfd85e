"""Routes of volume jobs: a volume in, progress, a label volume out."""

from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool

from vessa.errors import UnsupportedMedia
from vessa.schemas import JobInfo, Provenance
from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.api.dependencies import (
    FORM,
    READ,
    BanksDep,
    ChangeDep,
    body_chunks,
    callers_banks,
    limits_of,
    media_type,
    service_of,
)
from vessa_server.api.openapi import JOB_BODY, answering
from vessa_server.auth.keys import Caller
from vessa_server.serialization.job_request import JOB_FIELDS, JobRequest, read_job
from vessa_server.serialization.multipart import Form, FormStream
from vessa_server.serving.engine import Engine
from vessa_server.settings import Settings
from vessa_server.volume_jobs.jobs import Jobs

_WRITE_BYTES = 1 << 20  # of an upload, in one write
jobs_api = APIRouter(dependencies=[Depends(require_key)])

MEDIA = {
    "nifti": ("application/gzip", "labels.nii.gz"),
    "dicom-seg": ("application/dicom", "labels.dcm"),
    "nrrd": ("application/octet-stream", "labels.seg.nrrd"),
}


def jobs_of(request: Request) -> Jobs:
    """Return the volume jobs of this app."""
    jobs: Jobs = request.app.state.jobs
    return jobs


async def start_job(
    request: Request,
    engine: Engine,
    folder: Path,
    files: list[Path],
    wanted: JobRequest,
    caller: Caller,
    change: ChangeDep,
) -> JobInfo:
    """Make a job of the files in the folder of an upload; it is on the disk when this returns."""
    jobs, take = jobs_of(request), partial(limits_of(request).take, caller)
    reader = engine.reader.for_caller(callers_banks(engine, caller))
    async with contextmanager_in_threadpool(change("job.create", bank=wanted.bank)) as more:
        create = partial(jobs.create, folder, files, wanted, caller, reader, take)
        info = await run_sync(create, limiter=jobs.reading)
        more["job"] = info.id
    return info


async def receive_files(
    request: Request, folder: Path, settings: Settings, fields: set[str]
) -> tuple[Form, list[Path]]:
    """Write the uploaded files of a form to a folder as they arrive, without a whole one in memory.

    Returns the text fields and the files, those of the field `image`. Raises UnsupportedMedia, TooLarge.
    """
    if media_type(request) != FORM:
        raise UnsupportedMedia(f"The files must come in a form: send them as {FORM}.")
    most = settings.jobs.max_job_slices + len(fields)
    form = FormStream(request.headers["content-type"], fields, many="image", max_parts=most, folder=folder)
    pending = bytearray()
    limit, seconds = settings.jobs.max_job_bytes, settings.limits.body_timeout_s
    async for chunk in body_chunks(request, limit=limit, seconds=seconds):
        pending += chunk
        if len(pending) >= _WRITE_BYTES:
            await run_in_threadpool(form.feed, bytes(pending))
            pending.clear()
    await run_in_threadpool(form.feed, bytes(pending))
    return form.finish(), form.paths


@jobs_api.post("/jobs", status_code=202, openapi_extra=JOB_BODY)
async def create_job(request: Request, response: Response, caller: CallerDep, change: ChangeDep) -> JobInfo:
    """Segment a volume slice by slice, in the background.

    image: one NIfTI file (.nii, .nii.gz), one DICOM file of one or many frames, or, repeated, the files of
    one DICOM series. axis: how it is cut: auto (default: a DICOM's images, else the axis with the largest
    spacing), axial, coronal or sagittal. result: nifti, dicom-seg or nrrd (.seg.nrrd, as 3D Slicer
    writes it); by default DICOM SEG for DICOM and NIfTI for NIfTI. clean: 1 smooths the labels along z and
    removes islands of classes that form one component in every template. The answer's Location is the
    address of its state. Once this answers, the job is on the disk.
    """
    # Entered and left in this thread: an upload's folder is only created and removed.
    with (
        limits_of(request).work(caller),
        service_of(request).permit() as engine,
        jobs_of(request).upload(caller) as folder,
    ):
        form, files = await receive_files(request, folder, engine.settings, JOB_FIELDS)
        wanted = await run_in_threadpool(read_job, form)
        info = await start_job(request, engine, folder, files, wanted, caller, change)
    response.headers["Location"] = f"/jobs/{info.id}"
    return info


@jobs_api.get("/jobs", dependencies=READ)
def list_jobs(request: Request, caller: CallerDep) -> list[JobInfo]:
    """List the jobs of this key, the oldest first."""
    return jobs_of(request).visible(caller)


@jobs_api.get("/jobs/{identity}", dependencies=READ)
def job_info(identity: str, request: Request, caller: CallerDep) -> JobInfo:
    """Return the state of a job, and how many of its slices are done."""
    return jobs_of(request).info(identity, caller)


@jobs_api.delete("/jobs/{identity}", status_code=204)
def cancel_job(identity: str, request: Request, caller: CallerDep, change: ChangeDep) -> None:
    """Stop a job and delete all of it, or delete a finished one."""
    with change("job.delete", job=identity):
        jobs_of(request).cancel(identity, caller)


@jobs_api.get(
    "/jobs/{identity}/result",
    response_class=Response,
    responses=answering(*(media for media, _ in MEDIA.values())),
    dependencies=READ,
)
def job_result(identity: str, request: Request, caller: CallerDep) -> Response:
    """Return the label volume on the grid of the image: .nii.gz, DICOM SEG or .seg.nrrd.

    409 job_unfinished until the job is done.
    """
    kind, data = jobs_of(request).result(identity, caller)
    media, name = MEDIA[kind]
    return Response(data, media_type=media, headers={"Content-Disposition": f'attachment; filename="{name}"'})


@jobs_api.get("/jobs/{identity}/provenance", dependencies=READ)
def job_provenance(identity: str, request: Request, caller: CallerDep, banks: BanksDep) -> list[Provenance]:
    """Return the provenance of each finished slice, in their order: templates, weights, bank version.

    It names templates and patients of the bank: 404 unknown_bank for a key that may no longer use it.
    """
    banks.get(jobs_of(request).info(identity, caller).bank)
    return jobs_of(request).provenance(identity, caller)
