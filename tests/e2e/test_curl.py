"""Send heart scans by curl as DICOM and NIfTI; labels come back on the same grid."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scans import dicom_series, nifti

from vessa.client import AnnotatorClient
from vessa.datasets import open_dataset

ACDC = Path(__file__).resolve().parents[3] / "shared" / "data" / "acdc"
pytestmark = [
    pytest.mark.skipif(not ACDC.is_dir(), reason="no shared/data/acdc beside the repository"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="no curl"),
]
TEMPLATES, SCAN = "patient001", "patient002_frame01"
AFFINE = np.array([[-1.2, 0.4, 0.0, 90.0], [0.5, 1.1, 0.9, -40.0], [0.1, -0.3, 9.5, 12.0], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def scan() -> tuple[Any, Any]:
    """Return intensities int16 and labels uint8 of one volume, (x, y, z)."""
    dataset = open_dataset(ACDC)
    slices = [s for s in dataset.slices() if s.name.startswith(SCAN)]
    images, masks = ([read(s) for s in slices] for read in (dataset.image, dataset.mask))
    return np.stack(images).T.astype(np.int16) * 4 - 100, np.stack([m for m in masks if m is not None]).T


@pytest.fixture(scope="module")
def service(start_annotator: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service with the shipped nano weights and a bank of one patient."""
    started = start_annotator(tmp_path_factory.mktemp("curl"), VESSA_WEIGHTS="nano")
    dataset = open_dataset(ACDC)
    slices = [s for s in dataset.slices() if s.group == TEMPLATES]
    found = [(dataset.image(s), mask) for s in slices if (mask := dataset.mask(s)) is not None and mask.any()]
    with AnnotatorClient(started.url, started.api_key) as client:
        images, masks = zip(*found, strict=True)
        client.add_templates("heart", images, masks, dict(dataset.classes), [TEMPLATES] * len(images))
    return started


def curl(service: Any, path: str, *arguments: str | Path) -> bytes:
    command = ["curl", "-fsS", "-H", f"Authorization: Bearer {service.api_key}", *map(str, arguments)]
    return subprocess.run([*command, service.url + path], check=True, capture_output=True, timeout=120).stdout


def result(service: Any, *files: Path) -> bytes:
    """Send a volume as a job, wait for it, and return the result."""
    images = [argument for file in files for argument in ("-F", f"image=@{file}")]
    job = json.loads(curl(service, "/jobs", *images, "-F", "bank=heart"))["id"]
    for _ in range(600):
        state = json.loads(curl(service, f"/jobs/{job}"))["state"]
        if state in ("done", "failed"):
            break
        time.sleep(0.2)
    assert state == "done"
    return curl(service, f"/jobs/{job}/result")


def dice(labels: Any, truth: Any) -> float:
    """Return the mean Dice of the three classes of a volume."""
    both = [(labels == c, truth == c) for c in (1, 2, 3)]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in both]))


def test_a_nifti_volume_comes_back_where_it_lay(service: Any, scan: Any, tmp_path: Path) -> None:
    voxels, truth = scan
    sent, got = tmp_path / "scan.nii", tmp_path / "labels.nii.gz"
    sent.write_bytes(nifti(voxels, AFFINE))
    got.write_bytes(result(service, sent))
    labels = nib.load(got)
    np.testing.assert_allclose(labels.affine, nib.load(sent).affine)
    assert labels.shape == voxels.shape
    assert dice(np.asarray(labels.dataobj), truth) > 0.65


def test_a_dicom_series_comes_back_as_a_dicom_seg_on_its_grid(
    service: Any, scan: Any, tmp_path: Path
) -> None:
    voxels, truth = scan
    series = dicom_series(voxels, step=9.5)
    files = [tmp_path / f"{k}.dcm" for k in range(len(series))]
    for dataset, file in zip(series, files, strict=True):
        dataset.save_as(file, enforce_file_format=True)
    got = tmp_path / "labels.dcm"
    got.write_bytes(result(service, *reversed(files)))
    seg = hd.seg.segread(got)
    grid = hd.get_volume_from_series(series)
    labels = seg.get_volume(combine_segments=True).match_geometry(grid)
    expected = grid.with_array(_on(grid, series, truth))
    assert dice(labels.array, expected.array) > 0.65


def test_one_dicom_image_comes_back_as_a_dicom_seg_of_it(service: Any, scan: Any, tmp_path: Path) -> None:
    voxels, truth = scan
    middle = voxels.shape[2] // 2
    image = dicom_series(voxels, step=9.5)[middle]
    sent, got, drawn = tmp_path / "slice.dcm", tmp_path / "labels.dcm", tmp_path / "labels.png"
    image.save_as(sent, enforce_file_format=True)
    fields = ("-F", f"image=@{sent}", "-F", "bank=heart")
    got.write_bytes(curl(service, "/segment", *fields, "-H", "Accept: application/dicom"))
    drawn.write_bytes(curl(service, "/segment", *fields, "-H", "Accept: image/png"))
    seg = hd.seg.segread(got)
    assert seg.FrameOfReferenceUID == image.FrameOfReferenceUID
    labels = seg.get_pixels_by_source_instance([image.SOPInstanceUID], combine_segments=True)[0]
    np.testing.assert_array_equal(labels, np.asarray(Image.open(drawn)))
    assert dice(labels, truth[:, :, middle].T) > 0.65


def _on(grid: Any, series: list[Any], truth: Any) -> Any:
    """Return labels (x, y, z) in the order of highdicom's volume (slices by position, rows, columns)."""
    places = grid.map_indices_to_reference(np.array([[k, 0, 0] for k in range(len(series))]))
    stored = np.array([s.ImagePositionPatient for s in series], float)
    order = [int(np.argmin(np.linalg.norm(stored - place, axis=1))) for place in places]
    return truth.transpose(2, 1, 0)[order]
