"""Jobs over HTTP: a volume in, progress, a label volume out."""

from functools import partial

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from vessa.errors import UnsupportedMedia
from vessa.schemas import JobInfo, Provenance
from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.api.dependencies import FORM, limits_of, media_type, read_body, service_of
from vessa_server.api.openapi import JOB_BODY, answering
from vessa_server.serialization.job_request import read_job
from vessa_server.volume_jobs.runner import Jobs

jobs_api = APIRouter(dependencies=[Depends(require_key)])

MEDIA = {
    "nifti": ("application/gzip", "labels.nii.gz"),
    "dicom-seg": ("application/dicom", "labels.dcm"),
    "nrrd": ("application/octet-stream", "labels.seg.nrrd"),
}


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


@jobs_api.post("/jobs", status_code=202, openapi_extra=JOB_BODY)
async def create_job(request: Request, response: Response, caller: CallerDep) -> JobInfo:
    """Segment a volume slice by slice, in the background.

    image: one NIfTI file (.nii, .nii.gz), one DICOM file of one or many frames, or, repeated, the files of
    one DICOM series. axis: how it is cut: auto (default: a DICOM's images, else the axis with the largest
    spacing), axial, coronal or sagittal. result: nifti, dicom-seg or nrrd (.seg.nrrd, as 3D Slicer
    writes it); by default DICOM SEG for DICOM and NIfTI for NIfTI. The answer's Location tells how it goes.
    """
    limits = limits_of(request)
    with limits.work(caller), service_of(request).permit() as engine:
        if media_type(request) != FORM:
            raise UnsupportedMedia(f"a job needs a form: {FORM}")
        body = await read_body(
            request,
            limit=engine.settings.jobs.max_job_bytes,
            seconds=engine.settings.limits.body_timeout_s,
        )
        files, wish = await run_in_threadpool(
            read_job, request.headers["content-type"], body, engine.settings.jobs.max_job_slices
        )
        take = partial(limits.take, caller)
        jobs = _jobs(request)
        create = partial(jobs.create, files, wish, caller, engine, take)
        info = await run_sync(create, limiter=jobs.reading)
    response.headers["Location"] = f"/jobs/{info.id}"
    return info


@jobs_api.get("/jobs")
def list_jobs(request: Request, caller: CallerDep) -> list[JobInfo]:
    """The jobs of this key, the oldest first."""
    return _jobs(request).visible(caller)


@jobs_api.get("/jobs/{identity}")
def job_info(identity: str, request: Request, caller: CallerDep) -> JobInfo:
    """How a job goes: its state, and how many of its slices are done."""
    return _jobs(request).info(identity, caller)


@jobs_api.delete("/jobs/{identity}", status_code=204)
def cancel_job(identity: str, request: Request, caller: CallerDep) -> None:
    """Stop a job, or forget a finished one."""
    _jobs(request).cancel(identity, caller)


@jobs_api.get(
    "/jobs/{identity}/result",
    response_class=Response,
    responses=answering(*(media for media, _ in MEDIA.values())),
)
def job_result(identity: str, request: Request, caller: CallerDep) -> Response:
    """The label volume on the grid of the image: .nii.gz, DICOM SEG or .seg.nrrd.

    409 job_unfinished until the job is done.
    """
    kind, data = _jobs(request).result(identity, caller)
    media, name = MEDIA[kind]
    return Response(data, media_type=media, headers={"Content-Disposition": f'attachment; filename="{name}"'})


@jobs_api.get("/jobs/{identity}/provenance")
def job_provenance(identity: str, request: Request, caller: CallerDep) -> list[Provenance]:
    """What made the labels of each slice that is done, in their order: templates, weights, bank version."""
    return _jobs(request).provenance(identity, caller)
