"""Files over HTTP: volumes in the wrong place, tiny pictures, NRRD results, notes on what was repaired."""

from __future__ import annotations

import gzip
import io
import json
import time
from typing import Any

import nrrd
import numpy as np
import pytest
import tifffile
from PIL import Image
from scans import dicom_series, dicom_slice, nifti, phantom, written

from vessa_server.serving.engine import Engine

AFFINE = np.diag([1.5, 1.2, 5.0, 1.0])
NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nendian: little\n\n" + bytes(128)


def segment(server: Any, image: bytes, bank: str, accept: str = "image/png") -> Any:
    return server.http.post(
        "/segment", files={"image": ("i", image)}, data={"bank": bank}, headers={"Accept": accept}
    )


def template(server: Any, image: bytes, mask: bytes, bank: str) -> Any:
    data = {"bank": bank, "classes": '{"1": "ventricle"}', "group": "p"}
    return server.http.post("/templates", files={"image": ("i", image), "mask": ("m", mask)}, data=data)


def picture(array: Any, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "DICOM"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 64), (64, 1)])
def test_a_picture_of_few_pixels_is_an_error_of_its_caller(
    server: Any, bank: str, kind: str, size: tuple[int, int]
) -> None:
    server.seed(bank)
    pixels = np.full(size, 7, np.uint8)
    image = written(dicom_slice(pixels.astype(np.int16))) if kind == "DICOM" else picture(pixels, kind)
    answers = [segment(server, image, bank), template(server, image, picture(pixels // 7), bank)]
    if kind == "DICOM":
        answers.append(segment(server, image, bank, "application/dicom"))
        answers.append(server.http.post("/jobs", files={"image": ("i", image)}, data={"bank": bank}))
    for answer in answers:
        assert answer.status_code == 422, answer.text
        message = answer.json()["error"]["message"]
        assert f"sides of 3 pixels or more, got height {size[0]} x width {size[1]}" in message


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 40, 3), (40, 1, 3)])
def test_a_volume_of_tiny_slices_is_an_error_of_its_caller(
    server: Any, bank: str, shape: tuple[int, int, int]
) -> None:
    server.seed(bank)
    data = nifti(np.zeros(shape, np.int16), np.diag([1.0, 1, 9, 1]))
    answer = server.http.post("/jobs", files={"image": ("i", data)}, data={"bank": bank, "axis": "axial"})
    assert answer.status_code == 422, answer.text


@pytest.mark.parametrize("accept", ["image/png", "application/json", "application/dicom"])
def test_a_volume_sent_as_a_picture_is_told_of_jobs(server: Any, bank: str, accept: str) -> None:
    server.seed(bank)
    plain = nifti(phantom(), AFFINE)
    for name, data in {"NIfTI": plain, "NIfTI, gzipped": gzip.compress(plain), "NRRD": NRRD}.items():
        answer = segment(server, data, bank, accept)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_image"), name
        message = answer.json()["error"]["message"]
        assert ("POST /jobs" in message) == (accept != "application/dicom"), (name, message)
        if accept != "application/dicom":
            assert name.split(",")[0] in message
            assert "POST /jobs" in template(server, data, picture(np.ones((8, 8), np.uint8)), bank).text


def result_of(server: Any, files: list[bytes], bank: str, **fields: str) -> tuple[Any, dict[str, Any]]:
    parts = [("image", (str(i), data)) for i, data in enumerate(files)]
    answer = server.http.post("/jobs", files=parts, data={"bank": bank, **fields})
    assert answer.status_code == 202, answer.text
    identity = answer.json()["id"]
    deadline = time.monotonic() + 120
    while (info := server.http.get(f"/jobs/{identity}").json())["state"] not in ("done", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert info["state"] == "done", info
    return server.http.get(f"/jobs/{identity}/result"), info


@pytest.mark.parametrize("source", ["nifti", "dicom"])
def test_a_job_returns_a_segmentation_of_slicer(server: Any, bank: str, source: str, tmp_path: Any) -> None:
    server.seed(bank)
    voxels = phantom((40, 30, 3))
    files = [nifti(voxels, AFFINE)] if source == "nifti" else [written(f) for f in dicom_series(voxels)]
    labels, _ = result_of(server, files, bank, result="nifti")
    answer, _ = result_of(server, files, bank, result="nrrd")
    (tmp_path / "labels.seg.nrrd").write_bytes(answer.content)
    data, header = nrrd.read(str(tmp_path / "labels.seg.nrrd"))
    import nibabel as nib

    image = nib.Nifti1Image.from_bytes(gzip.decompress(labels.content))
    assert np.array_equal(data, np.asarray(image.dataobj))
    assert [header[f"Segment{i}_Name"] for i in (0, 1)] == ["ventricle", "wall"]
    lps = {"left-posterior-superior": np.diag([-1.0, -1, 1]), "right-anterior-superior": np.eye(3)}
    turn = lps[header["space"]]
    assert np.allclose(
        turn @ np.asarray(header["space directions"], float).T, image.affine[:3, :3], atol=1e-4
    )
    assert np.allclose(turn @ header["space origin"], image.affine[:3, 3], atol=1e-4)


def notes(answer: Any) -> list[str]:
    assert answer.is_success, answer.text
    return json.loads(answer.headers.get("X-Notes", "[]"))


def test_what_was_repaired_is_said_in_the_answer(server: Any, bank: str) -> None:
    server.seed(bank)
    holes = np.linspace(0, 4000, 48 * 64, dtype=np.float32).reshape(48, 64)
    holes[:, :5] = np.nan
    file = io.BytesIO()
    tifffile.imwrite(file, holes)
    told = "240 pixels are NaN or infinite; they are read as background"
    for accept in ("image/png", "application/json", "application/vnd.safetensors"):
        assert notes(segment(server, file.getvalue(), bank, accept)) == [told]
    mask = picture((np.arange(48 * 64).reshape(48, 64) > 2000).astype(np.uint8))
    assert notes(template(server, file.getvalue(), mask, bank)) == [told]
    assert notes(segment(server, picture(np.full((48, 64), 9, np.uint8)), bank)) == []
    bare = dicom_slice(phantom((64, 48, 1))[:, :, 0].T)
    del bare.PixelSpacing, bare.ImagePositionPatient, bare.ImageOrientationPatient, bare.FrameOfReferenceUID
    bare.PatientBirthDate = "1990/01/"
    for accept in ("image/png", "application/dicom"):
        found = " ".join(notes(segment(server, written(bare), bank, accept)))
        assert "no usable PixelSpacing" in found
        assert "no position or orientation" in found
        assert "1990" not in found


def test_a_dicom_that_no_seg_can_refer_to_is_named_before_anything_is_computed(
    server: Any, bank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.seed(bank)
    file = dicom_slice(phantom((64, 48, 1))[:, :, 0].T)
    del file.StudyInstanceUID
    computed: list[Any] = []
    real = Engine.annotate

    async def annotate(self: Any, request: Any, client: str) -> Any:
        computed.append(request)
        return await real(self, request, client)

    monkeypatch.setattr(Engine, "annotate", annotate)
    answer = segment(server, written(file), bank, "application/dicom")
    assert (answer.status_code, computed) == (422, [])
    assert "StudyInstanceUID" in answer.json()["error"]["message"]
    assert segment(server, written(file), bank).status_code == 200
    assert len(computed) == 1
