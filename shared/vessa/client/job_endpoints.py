"""What a client says about jobs: volumes that the annotator segments in the background."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from pydantic import ValidationError

from vessa.client.endpoints import Call
from vessa.errors import BadResponse, InvalidImage, Unreachable, VessaError
from vessa.schemas import JobInfo
from vessa.volumes.files import series_files

POLL_S = 1.0  # between two questions of how a job goes
PATIENCE_S = 300.0  # without an answer to any: a service that is started again goes on with its jobs


def create(
    path: Path,
    *,
    bank: str,
    classes: Sequence[str] | None = None,
    group: str | None = None,
    axis: str = "auto",
    result: str | None = None,
) -> Call[JobInfo]:
    """POST /jobs with a NIfTI or DICOM file, or the DICOM files of a folder. InvalidImage without any."""
    paths = series_files(path) if path.is_dir() else [path]
    if not paths:
        raise InvalidImage(f"{path} holds no DICOM files")
    try:
        # names stay here: they may tell who the patient is
        files = [("image", (f"{i}", one.read_bytes())) for i, one in enumerate(paths)]
    except OSError as error:
        raise InvalidImage(f"{path} cannot be read") from error
    given = {"bank": bank, "axis": axis, "group": group, "result": result}
    fields = {key: value for key, value in given.items() if value is not None}
    if classes is not None:
        fields["classes"] = json.dumps(list(classes))
    return Call("POST", "/jobs", _job, {"files": files, "data": fields}, "unsent")


def info(identity: str) -> Call[JobInfo]:
    """GET /jobs/{id}."""
    return Call("GET", f"/jobs/{identity}", _job)


def bear(error: VessaError, identity: str, heard: float) -> None:
    """Take it that nothing was told of a job; Unreachable when the last answer is too long ago.

    heard: time of that, `time.monotonic()`, s
    """
    if time.monotonic() - heard > PATIENCE_S:
        raise Unreachable(f"nothing was heard of job {identity} for {PATIENCE_S:.0f} s: {error}") from error


def result(identity: str) -> Call[bytes]:
    """GET /jobs/{id}/result."""
    return Call("GET", f"/jobs/{identity}/result", lambda response: response.content)


def cancel(identity: str) -> Call[None]:
    """DELETE /jobs/{id}."""
    return Call("DELETE", f"/jobs/{identity}", lambda _: None)


def _job(response: httpx.Response) -> JobInfo:
    try:
        return JobInfo.model_validate_json(response.content)
    except ValidationError as error:
        raise BadResponse("/jobs answered something that is not the annotator's protocol") from error
