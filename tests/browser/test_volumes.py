"""Drive volumes in the console: a job with progress and cancel, slices, three planes, export on the grid."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from browser_steps import pixels, seed, stage_at, until, worklist
from scans import dicom_series, written

from vessa.datasets import open_dataset

pytestmark = pytest.mark.browser
AXIAL = (1, 0, 0, 0, 1, 0)


@pytest.fixture
def stack(phantoms: Path) -> np.ndarray:
    """A phantom patient as a volume (I, J, K)."""
    dataset = open_dataset(phantoms)
    return np.stack([dataset.image(s).T for s in list(dataset.slices())[3:6]], -1)


def exported(page: Any, name: str, folder: Path) -> zipfile.ZipFile:
    """Download an export by its link."""
    with page.expect_download() as download:
        page.get_by_role("link", name=name, exact=True).click()
    path = folder / "export.zip"
    download.value.save_as(path)
    return zipfile.ZipFile(path)


def test_a_volume_is_segmented_corrected_shown_and_exported(
    page: Any, console: Any, phantoms: Path, stack: np.ndarray, tmp_path: Path, shot: Any
) -> None:
    seed(console, phantoms, "volume")
    path = tmp_path / "scan.nii.gz"
    affine = np.diag([1.5, 1.5, 8, 1])
    nib.save(nib.Nifti1Image(np.repeat(stack, 4, -1), affine), path)
    page.reload()
    worklist(page, "volume", "volume")
    page.get_by_label("Files").set_input_files(path)
    page.get_by_text("open, doubt").first.wait_for(timeout=120_000)
    until(page, lambda: not pixels(page).startswith("0 px 0 px"))
    page.get_by_text("1 of 12").wait_for()
    page.mouse.move(*stage_at(page, 0.5, 0.5))
    page.mouse.wheel(0, 100)
    page.get_by_text("2 of 12").wait_for()
    shot(page, "volume-slice")
    page.get_by_role("button", name="Planes and 3D").click()
    page.get_by_text("Loading the viewer.").wait_for(state="detached", timeout=60_000)
    assert page.get_by_text("cannot be shown").count() == 0
    page.wait_for_timeout(1500)  # some frames of WebGL
    shot(page, "volume", whole=False)
    page.get_by_role("button", name="Close", exact=True).click()
    page.get_by_role("link", name="Review", exact=True).click()
    page.get_by_text("12 open").wait_for()
    page.get_by_role("button", name="scan slice 001").click()
    page.keyboard.press("a")
    page.get_by_text("1 accepted").wait_for()
    assert page.get_by_role("link", name="DICOM SEG").count() == 0
    with exported(page, "NIfTI labels", tmp_path) as archive:
        counts = json.loads(archive.read("export.json"))
        labels = nib.Nifti1Image.from_bytes(gzip.decompress(archive.read("scan.nii.gz")))
    assert counts["volumes"] == {"scan.nii.gz": {"slices": 12, "accepted": 1}}
    np.testing.assert_allclose(labels.affine, affine)
    slices = np.asarray(labels.dataobj)
    assert slices[..., 0].any()
    assert not slices[..., 1:].any()


def test_a_dicom_series_comes_back_as_a_segmentation_of_it(
    page: Any, console: Any, phantoms: Path, stack: np.ndarray, tmp_path: Path
) -> None:
    import highdicom as hd

    seed(console, phantoms, "series")
    files = dicom_series(stack.astype(np.int16), orientation=AXIAL)
    folder = tmp_path / "series"
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"IM{number:04d}").write_bytes(written(file))  # as scanners name them, without a suffix
    page.reload()
    worklist(page, "series", "series")
    page.get_by_label("Files").set_input_files(sorted(folder.iterdir()))
    page.get_by_role("button", name="IM0000 3 slices").wait_for(timeout=60_000)
    page.get_by_text("open, doubt").first.wait_for(timeout=60_000)
    page.get_by_role("link", name="Review", exact=True).click()
    page.get_by_text("3 open").wait_for()
    page.keyboard.press("a")
    page.get_by_text("1 accepted").wait_for()
    with exported(page, "DICOM SEG", tmp_path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dcm")]
        seg = hd.seg.segread(io.BytesIO(archive.read(name)))
    assert {i[2] for i in seg.get_source_image_uids()} <= {f.SOPInstanceUID for f in files}


def test_a_job_is_cancelled_and_started_again(
    page: Any, console: Any, phantoms: Path, stack: np.ndarray, tmp_path: Path
) -> None:
    seed(console, phantoms, "cancelled")
    path = tmp_path / "long.nii.gz"
    nib.save(nib.Nifti1Image(np.tile(stack, (1, 1, 60)), np.diag([1.5, 1.5, 8, 1])), path)
    page.reload()
    worklist(page, "cancelled", "cancelled")
    page.get_by_label("Files").set_input_files(path)
    page.get_by_text("of 180 slices").wait_for(timeout=60_000)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    page.get_by_role("region", name="Volumes").get_by_role("button", name="Segment", exact=True).click()
    page.get_by_text("of 180 slices").wait_for()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove").click()
    page.get_by_text("of 180 slices").wait_for(state="detached")
    until(page, lambda: page.locator(".items button").count() == 0)
