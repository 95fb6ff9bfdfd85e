"""Volumes in a worklist: slices as items, a job's labels, decisions, and labels on the grid of the files."""

from __future__ import annotations

import gzip
import io
import json
import time
import zipfile
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from scans import dicom_series, nifti, phantom, written

AFFINE = np.array([[-1.2, 0, 0.1, 3], [0, 1.5, 0, 4], [0.1, 0, 6.0, 5], [0, 0, 0, 1]], np.float32)
SHAPE = (40, 30, 5)


def send(server: Any, bank: str, *files: bytes, name: str = "scan.nii.gz") -> tuple[str, dict[str, Any]]:
    """Add a volume to the worklist of a bank; returns its path and description."""
    server.seed(bank)
    assert server.http.post("/worklists", json={"name": bank, "bank": bank}).status_code == 201
    parts = [("image", (f"{i}.bin", data)) for i, data in enumerate(files)]
    answer = server.http.post(f"/worklists/{bank}/volumes", files=parts, data={"name": name, "group": "g"})
    assert answer.status_code == 201, answer.text
    return f"/worklists/{bank}/volumes/{answer.json()['id']}", answer.json()


def items(server: Any, bank: str) -> list[dict[str, Any]]:
    """The items of a worklist."""
    return server.http.get(f"/worklists/{bank}").json()["items"]


def segment(server: Any, path: str) -> dict[str, Any]:
    """Run the volume's job to its end and take its labels."""
    job = server.http.post(f"{path}/job")
    assert job.status_code == 202, job.text
    assert server.http.post(f"{path}/job").json()["id"] == job.json()["id"]  # one job at a time
    for _ in range(600):
        if server.http.get(f"/jobs/{job.json()['id']}").json()["state"] == "done":
            break
        time.sleep(0.05)
    taken = server.http.post(f"{path}/labels")
    assert taken.status_code == 200, taken.text
    return taken.json()


def draw(server: Any, bank: str, item: dict[str, Any]) -> np.ndarray:
    """Draw a block of class 2 on an item and accept it."""
    path = f"/worklists/{bank}/items/{item['id']}"
    labels = np.zeros((item["height"], item["width"]), np.uint8)
    labels[5:9, 3:12] = 2
    assert server.http.put(f"{path}/labels", content=labels.tobytes()).status_code == 200
    assert server.http.post(f"{path}/decision", json={"decision": "accepted"}).status_code == 200
    return labels


def test_slices_take_the_labels_of_a_job_unless_a_person_drew_them(server: Any, bank: str) -> None:
    data = gzip.compress(nifti(phantom(SHAPE), AFFINE))
    path, info = send(server, bank, data)
    assert (info["slices"], info["dicom"], info["job"]) == (5, False, "")
    assert [i["slice"] for i in items(server, bank)] == [0, 1, 2, 3, 4]
    drawn = draw(server, bank, items(server, bank)[2])
    assert segment(server, path) == {"taken": 4, "kept": 1}
    found = items(server, bank)
    assert [i["doubt"] is None for i in found] == [False, False, True, False, False]
    assert found[0]["templates"]
    labels = nib.Nifti1Image.from_bytes(server.http.get(f"{path}/labels.nii").content)
    np.testing.assert_allclose(labels.affine, AFFINE, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(labels.dataobj)[:, :, 2].T, drawn)
    shown = nib.Nifti1Image.from_bytes(server.http.get(f"{path}/image.nii").content)
    assert np.asarray(shown.dataobj).max() == 255
    jobs = [job for job in server.http.get("/jobs").json() if job["bank"] == bank]
    assert jobs == []  # its labels are in the worklist now
    answer = server.http.post(f"{path}/labels")
    assert "no job" in answer.json()["error"]["message"]


def test_accepted_slices_return_to_the_grid_of_a_nifti_file(server: Any, bank: str) -> None:
    data = gzip.compress(nifti(phantom(SHAPE), AFFINE))
    send(server, bank, data)
    export = f"/worklists/{bank}/export?format=nifti"
    assert "accepted" in server.http.get(export).json()["error"]["message"]
    drawn = draw(server, bank, items(server, bank)[3])
    with zipfile.ZipFile(io.BytesIO(server.http.get(export).content)) as archive:
        counts = json.loads(archive.read("export.json"))
        back = nib.Nifti1Image.from_bytes(gzip.decompress(archive.read("scan.nii.gz")))
    assert counts["volumes"] == {"scan.nii.gz": {"slices": 5, "accepted": 1}}
    labels = np.asarray(back.dataobj)
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-5)
    np.testing.assert_array_equal(labels[:, :, 3].T, drawn)
    assert not labels[:, :, :3].any()
    refused = server.http.get(f"/worklists/{bank}/export?format=dicom-seg").json()["error"]["message"]
    assert "none of them gray DICOM" in refused


def test_accepted_slices_of_a_dicom_series_are_a_segmentation_of_it(server: Any, bank: str) -> None:
    files = dicom_series(phantom(SHAPE))
    path, info = send(server, bank, *map(written, files), name="series")
    assert info["dicom"] is True
    drawn = draw(server, bank, items(server, bank)[1])
    answer = server.http.get(f"/worklists/{bank}/export?format=dicom-seg")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        seg = hd.seg.segread(io.BytesIO(archive.read("series.dcm")))
    assert {i[2] for i in seg.get_source_image_uids()} <= {f.SOPInstanceUID for f in files}
    assert int(seg.pixel_array.sum()) == int((drawn > 0).sum())
    assert server.http.delete(path).status_code == 204
    assert items(server, bank) == []
    assert server.http.get(f"{path}/image.nii").json()["error"]["code"] == "unknown_worklist"


def test_the_same_files_are_added_once_and_erased_with_their_patient(server: Any, bank: str) -> None:
    data = nifti(phantom(SHAPE), AFFINE)
    path, _ = send(server, bank, data)
    assert send(server, bank, data)[0] == path
    assert len(items(server, bank)) == 5
    server.http.delete("/groups/g")
    assert server.http.get(f"/worklists/{bank}").json()["volumes"] == []


def test_pictures_have_no_grid(server: Any, bank: str, file_of: Any, example: Any) -> None:
    server.http.post("/worklists", json={"name": bank, "bank": bank})
    files = {"image": ("q.png", file_of(example(7)[0]))}
    server.http.post(f"/worklists/{bank}/items", files=files, data={"name": "q.png"})
    answer = server.http.get(f"/worklists/{bank}/export?format=nifti")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("kind", ["png", "tiff", "nifti", "dicom"])
def test_slices_to_draw_on_are_decoded_as_they_are_shown(
    server: Any, kind: str, file_of: Any, example: Any
) -> None:
    volume = phantom(SHAPE)
    files = {
        "png": [file_of(example(3)[0])],
        "tiff": [file_of(example(3)[0], "TIFF")],
        "nifti": [nifti(volume, AFFINE)],
        "dicom": [written(f) for f in dicom_series(volume)],
    }[kind]
    parts = [("image", (f"{i}.bin", data)) for i, data in enumerate(files)]
    answer = server.http.post("/slices", files=parts)
    assert answer.status_code == 200, answer.text
    shape = tuple(map(int, answer.headers["X-Shape"].split(",")))
    pixels = np.frombuffer(answer.content, np.uint8).reshape(shape)
    if kind in ("png", "tiff"):
        np.testing.assert_array_equal(pixels[0], example(3)[0])
    else:
        assert shape == (5, 30, 40)
        assert pixels.max() > pixels.min()
