"""`segment_volume` of both clients."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from scans import dicom_series, nifti, phantom, written

from vessa.client import AsyncAnnotatorClient, job_endpoints
from vessa.client.endpoints import Call
from vessa.errors import InvalidImage, InvalidRequest, NoTemplate, UnknownJob, Unreachable
from vessa.volumes import read_volume


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A NIfTI file of 6 slices; the job's state is polled every 20 ms."""
    monkeypatch.setattr(job_endpoints, "POLL_S", 0.02)
    path = tmp_path / "scan.nii"
    path.write_bytes(nifti(phantom((40, 32, 6)), np.diag([1.0, 2.0, 5.0, 1.0])))
    return path


def test_the_running_annotator_segments_a_volume(ask_annotator: Any, volume: Path) -> None:
    y, x = np.mgrid[:40, :48]
    mask = (np.hypot(y - 20, x - 24) < 8).astype(np.uint8)
    ask_annotator("add_templates", "volumes", [mask * 180], [mask], {1: "disk"}, ["p1"])
    told: list[Any] = []
    data = ask_annotator("segment_volume", volume, bank="volumes", progress=told.append)
    labels, image = nib.Nifti1Image.from_bytes(gzip.decompress(data)), nib.load(volume)
    assert labels.shape == image.shape
    np.testing.assert_allclose(labels.affine, image.affine)
    assert set(np.unique(np.asarray(labels.dataobj))) <= {0, 1}
    assert (told[-1].state, told[-1].slices, told[-1].done) == ("done", 6, 6)
    with pytest.raises(UnknownJob):  # it was deleted after the download
        ask_annotator("_send", Call("GET", f"/jobs/{told[-1].id}", lambda response: response))


def test_a_failed_job_raises_its_error_and_is_deleted(ask: Any, volume: Path) -> None:
    requests = []
    job = {"id": "j", "bank": "b", "slices": 6, "done": 2, "result": "nifti"}

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(f"{request.method} {request.url.path}")
        if request.url.path == "/jobs/j/result":
            body = {"error": {"code": "no_template", "message": "of another group"}}
            return httpx.Response(409, json=body)
        state = "running" if len(requests) < 3 else "failed"
        return httpx.Response(200, json={**job, "state": state})

    with pytest.raises(NoTemplate, match="another group"):
        ask(handler, "segment_volume", volume, bank="b")
    assert requests == ["POST /jobs", "GET /jobs/j", "GET /jobs/j", "GET /jobs/j/result", "DELETE /jobs/j"]


def test_a_job_survives_a_short_outage_of_the_service(
    ask: Any, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []
    job = {"id": "j", "bank": "b", "slices": 6, "done": 2, "result": "nifti"}

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(f"{request.method} {request.url.path}")
        if requests[-1] == "GET /jobs/j":
            if len(requests) < 9:
                raise httpx.ConnectError("refused")
            return httpx.Response(200, json={**job, "state": "done"})
        if requests[-1] == "GET /jobs/j/result":
            return httpx.Response(200, content=b"labels")
        if requests[-1] == "DELETE /jobs/j":  # the response to an earlier DELETE was lost
            return httpx.Response(404, json={"error": {"code": "unknown_job", "message": "none"}})
        return httpx.Response(200, json={**job, "state": "running"})

    assert ask(handler, "segment_volume", volume, bank="b") == b"labels"
    requests.clear()
    monkeypatch.setattr(job_endpoints, "PATIENCE_S", 0.0)
    with pytest.raises(Unreachable, match="no response about job j"):
        ask(handler, "segment_volume", volume, bank="b")


def test_a_cancelled_task_cancels_its_job(volume: Path) -> None:
    requests = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(f"{request.method} {request.url.path}")
        job = {"id": "j", "bank": "b", "slices": 6, "done": 2, "result": "nifti", "state": "running"}
        return httpx.Response(200, json=job)

    async def run() -> None:
        transport = httpx.MockTransport(handler)
        async with AsyncAnnotatorClient("http://annotator", "a-key", transport=transport) as client:
            task = asyncio.create_task(client.segment_volume(volume, bank="b"))
            while len(requests) < 3:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert requests[-1] == "DELETE /jobs/j"


def test_a_missing_volume_is_named(ask: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match="cannot be read"):
        ask(lambda request: pytest.fail("it was sent"), "segment_volume", tmp_path / "none.nii", bank="b")


def test_a_labeled_volume_is_shown_and_saved_in_each_format(
    ask_annotator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_endpoints, "POLL_S", 0.02)
    y, x = np.mgrid[:40, :48]
    mask = (np.hypot(y - 20, x - 24) < 8).astype(np.uint8)
    ask_annotator("add_templates", "labeled", [mask * 180], [mask], {1: "disk"}, ["p1"])
    folder = tmp_path / "series"
    folder.mkdir()
    for number, file in enumerate(dicom_series(phantom((40, 32, 6)))):
        (folder / f"{number}.dcm").write_bytes(written(file))
    told: list[Any] = []
    found = ask_annotator("label_volume", folder, bank="labeled", progress=lambda *done: told.append(done))
    assert told[-1] == (6, 6)
    assert found.labels.shape == found.volume.shape == (40, 32, 6)
    assert found.classes == {1: "disk"}
    assert repr(found).startswith("LabeledVolume(40 x 32 x 6; disk: ")
    assert found.overlay().shape == (32, 40, 3)
    assert "disk" in found._repr_html_()
    assert found._repr_png_()[:4] == b"\x89PNG"
    for name in ("x.nii.gz", "x.seg.nrrd", "x.dcm"):
        found.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii.gz").voxels, found.labels)
    with pytest.raises(InvalidRequest, match="not as"):
        found.save(tmp_path / "x.png")
    with pytest.raises(InvalidRequest, match="slices 0 to 5"):
        found.overlay(6)
