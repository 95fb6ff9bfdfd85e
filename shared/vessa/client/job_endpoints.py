"""Requests about jobs: volumes that the annotator segments in the background."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from vessa.client.endpoints import Call, reads
from vessa.errors import InvalidImage, Unreachable, VessaError
from vessa.schemas import JobInfo
from vessa.volumes.dicom.series import series_files

_log = logging.getLogger(__name__)

POLL_S = 1.0  # between two requests for a job's state
PATIENCE_S = 300.0  # without any response; a service that restarts resumes its jobs
_JOB = TypeAdapter(JobInfo)


def create(
    path: Path,
    *,
    bank: str,
    classes: Sequence[str] | None = None,
    group: str | None = None,
    axis: str = "auto",
    result: str | None = None,
    series: int | None = None,
    clean: bool = False,
) -> Call[JobInfo]:
    """Build POST /jobs with a NIfTI or DICOM file, or the files of one DICOM series of a folder.

    series: place of one of several series in the folder, from 1. Raises InvalidImage, InvalidRequest as
    `vessa.volumes.dicom.series.series_files` does; files that are left out go to the log.
    """
    paths, notes = series_files(path, series) if path.is_dir() else ([path], [])
    for note in notes:
        _log.warning("%s: %s", path.name, note)
    try:
        # File names are not sent: they may identify the patient.
        files = [("image", (f"{i}", one.read_bytes())) for i, one in enumerate(paths)]
    except OSError as error:
        raise InvalidImage(f"{path.name} cannot be read: {error.strerror}") from error
    given = {"bank": bank, "axis": axis, "group": group, "result": result}
    fields = {key: value for key, value in given.items() if value is not None}
    if clean:
        fields["clean"] = "1"
    if classes is not None:
        fields["classes"] = json.dumps(list(classes))
    return Call("POST", "/jobs", reads(_JOB), {"files": files, "data": fields}, "unsent")


def info(identity: str) -> Call[JobInfo]:
    """Build GET /jobs/{id}."""
    return Call("GET", f"/jobs/{identity}", reads(_JOB))


def check_patience(error: VessaError, identity: str, answered: float) -> None:
    """Raise Unreachable when the service has not responded for PATIENCE_S seconds.

    answered: time of its last response, `time.monotonic()`, s
    """
    if time.monotonic() - answered > PATIENCE_S:
        raise Unreachable(
            f"no response about job {identity} for {PATIENCE_S:.0f} s; the last error was: {error}"
        ) from error


def result(identity: str) -> Call[bytes]:
    """Build GET /jobs/{id}/result."""
    return Call("GET", f"/jobs/{identity}/result", lambda response: response.content)


def cancel(identity: str) -> Call[None]:
    """Build DELETE /jobs/{id}."""
    return Call("DELETE", f"/jobs/{identity}", lambda _: None)
