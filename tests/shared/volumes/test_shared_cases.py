"""Each generator of ../shared/cases/formats as a test, with the right value that its README states.

The generators lie beside the repository, not in it; without them the tests are skipped. The same kinds are
covered by the tests of their own modules, with files made here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from vessa.datasets import open_dataset
from vessa.datasets.verify import verify
from vessa.errors import InvalidDataset, InvalidImage, VessaError
from vessa.images import read_image
from vessa.intensities import to_bytes
from vessa.masks.files import class_ids, decode_mask
from vessa.volumes import check_dicom_seg, read_volume, write_labels

CASES = Path(os.environ.get("VESSA_CASES", Path(__file__).parents[4] / "shared" / "cases" / "formats"))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no shared/cases/formats beside the repository")


def made(folder: Path, kind: str, *arguments: str) -> Path:
    """Run a generator in a folder."""
    command = [sys.executable, "-W", "ignore", str(CASES / kind / "make.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def labels_of(path: Path, kind: str = "nifti") -> bytes:
    """Return labels of a volume: 1 where it is bright."""
    volume = read_volume(path)
    labels = (volume.voxels > volume.voxels.mean()).astype(np.uint8)
    return write_labels(volume, labels, {1: "bright"}, "test", kind)


def corners(image: Any) -> Any:
    size = np.array(image.GetSize()) - 1
    return [
        image.TransformContinuousIndexToPhysicalPoint([float(v) for v in size * np.array(at)])
        for at in np.ndindex(2, 2, 2)
    ]


def itk(path: Path) -> Any:
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk.ReadImage(str(path))


def test_nifti_qform_sform(tmp_path: Path) -> None:
    folder = made(tmp_path, "nifti_qform_sform")
    for name in ("q1_s2", "q1_s1", "q0_s0", "q1_s0", "q0_s1"):
        source, labels = folder / f"{name}.nii.gz", folder / f"labels_{name}.nii.gz"
        labels.write_bytes(labels_of(source))
        one, two = nib.load(source), nib.load(labels)
        assert np.allclose(one.affine, two.affine, atol=1e-5), name
        codes = [(int(i.header["qform_code"]), int(i.header["sform_code"])) for i in (one, two)]
        assert codes[0] == codes[1], name
        if name != "q0_s1":  # its header contradicts itself
            assert np.allclose(corners(itk(source)), corners(itk(labels)), atol=1e-3), name


def test_multiframe_classic(tmp_path: Path) -> None:
    folder = made(tmp_path, "multiframe_classic")
    for name in ("cbct", "spect"):
        labels = folder / f"labels_{name}.nii.gz"
        labels.write_bytes(labels_of(folder / f"{name}.dcm"))
        assert np.allclose(corners(itk(labels)), corners(itk(folder / f"{name}.dcm")), atol=1e-3), name


def test_dicom_series(tmp_path: Path) -> None:
    folder = made(tmp_path, "dicom_series")
    with pytest.raises(InvalidImage, match="empty"):
        read_volume(folder / "last_slice_empty")
    for name in (
        "no_preamble_every_second",
        "no_preamble_last_two",
        "gzipped_last_two",
        "no_preamble_all",
        "cd",
    ):
        assert read_volume(folder / name).shape[2] == 6, name
    tilted = read_volume(folder / "gantry_tilt_20deg")
    assert any("ITK" in note for note in tilted.notes)
    check_dicom_seg(tilted)
    spacings = {
        "positions_rounded_to_0.1mm": 0.625,
        "orientation_rounded_to_2_decimals": 5,
        "micro_ct_0.5um": 0.0005,
    }
    for name, spacing in spacings.items():
        assert read_volume(folder / name).spacing[2] == pytest.approx(spacing, rel=0.03), name


def test_dicom_seg_headers(tmp_path: Path) -> None:
    folder = made(tmp_path, "dicom_seg_headers")
    for case in sorted(p for p in folder.iterdir() if p.is_dir()):
        volume = read_volume(case)
        if case.name == "cr_pixel_spacing_0":
            assert volume.image(2, 0).std() > 0
            continue
        seg = write_labels(volume, np.ones(volume.shape, np.uint8), {1: "bright"}, "test", "dicom-seg")
        assert seg[128:132] == b"DICM", case.name
        assert not any("Mueller" in note for note in volume.notes)


def test_nifti_misc(tmp_path: Path) -> None:
    folder = made(tmp_path, "nifti_misc")
    base = nib.load(folder / "base.nii").get_fdata()
    for name in ("qfac0", "units_weird", "units4", "pixdimz0", "vox0", "two_d"):
        path = folder / (f"{name}.nii" if (folder / f"{name}.nii").is_file() else f"{name}.nii.gz")
        volume = read_volume(path)
        expected = base[:, :, :1] if name == "two_d" else base
        assert np.array_equal(volume.voxels, expected), name
        if name == "vox0":  # nibabel reads the header as voxels here, ITK 4 bytes before the first voxel
            assert "at byte 0, inside the header" in volume.notes[0]
            continue
        reference = np.asarray(nib.load(path).dataobj, float)
        assert np.array_equal(volume.voxels, reference.reshape(volume.shape)), name
        image = sitk.GetArrayFromImage(itk(path)).T
        assert np.array_equal(image.reshape(volume.shape), volume.voxels), name
    holes = read_volume(folder / "nan_bg.nii.gz")
    assert np.isfinite(holes.voxels).all()
    assert any("NaN" in note for note in holes.notes)
    for path in sorted(folder.glob("*.*")):  # each is a volume, or an error of ours without its folder
        outcome = ""
        try:
            read_volume(path)
        except VessaError as error:
            outcome = error.message
        assert str(folder) not in outcome


def test_png_jpeg_tiff(tmp_path: Path) -> None:
    folder = made(tmp_path, "png_jpeg_tiff")
    want = to_bytes(np.load(folder / "g12.npy").astype(np.float32)).astype(float)

    def shown(name: str) -> Any:
        pixels = read_image(folder / name).astype(float)
        return pixels if pixels.ndim == 2 else pixels[..., 0]

    for name in ("rgb16.png", "rgb16.tif", "gray16.png", "gray16.tif", "la16.png", "planar_rgb16.tif",
                 "float.tif", "float64.tif"):  # fmt: skip
        assert np.abs(shown(name) - want).max() <= 2, name
    assert np.abs(shown("white0_16.tif") - shown("white0_8.tif")).mean() < 25
    disk = np.hypot(*np.mgrid[-48:48, -64:64]) < 28
    for name in ("white0_16.tif", "white0_8.tif", "float16.tif"):
        assert shown(name)[disk].mean() > shown(name)[~disk].mean() + 50, name
    assert np.array_equal(read_image(folder / "camera_mpo.jpg"), read_image(folder / "camera_plain.jpg"))
    for name in ("stack_trunc.tif", "two_channel.tif"):
        with pytest.raises(InvalidImage, match="TIFF"):
            read_image(folder / name)
    if (folder / "int8.tif").is_file():
        assert shown("int8.tif").min() < shown("int8.tif").max()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vessa_server.pretraining.data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("sets")
    write_phantoms(folder / "phantoms", patients=5, slices=2, size=48, seed=0)
    made(folder, "datasets", str(folder / "phantoms" / "heart"))
    return folder / "work"


def findings(folder: Path) -> str:
    return "\n".join(f"{f.kind} {f.where} {f.message}" for f in verify(open_dataset(folder)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d_nn257", ("256", "257")),
        ("d_nnhalf", ("0.4", "1.5")),
        ("d_nnneg", ("-1",)),
        ("d_nnbig", ("420",)),
        ("d_nnaseg", ("1001", "2001")),
        ("d_nnshift", ("elsewhere|grid|geometry",)),
        ("d_orphan", ("_mask",)),
        ("d_isic", ("one patient|one group",)),
    ],
)
def test_datasets_with_a_finding(sets: Path, name: str, words: tuple[str, ...]) -> None:
    import re

    try:
        text = findings(sets / name)
    except InvalidDataset as error:
        text = str(error)
    for word in words:
        assert re.search(word, text), text


def test_datasets_that_are_read(sets: Path) -> None:
    assert list(open_dataset(sets / "d_nnignore").classes.values()) == ["a"]
    for name in ("d_upperhalf", "d_jpghalf", "d_bom", "d_splitbom"):
        assert len(open_dataset(sets / name).slices()) == 10, name
    whole = open_dataset(sets / "d_bom")
    for name in ("d_1bit", "d_gray2bit", "d_gray4bit"):
        dataset = open_dataset(sets / name)
        for one, other in zip(dataset.slices(), whole.slices(), strict=True):
            stored = whole.mask(other)
            mask = dataset.mask(one)
            assert mask is not None
            assert stored is not None
            assert np.array_equal(mask, stored > 0 if name == "d_1bit" else stored), name
            data = next((sets / name / "masks").glob(f"{one.name}.*")).read_bytes()
            over_http = class_ids(decode_mask(data, 1 << 24, size=mask.shape), dataset.classes)
            assert np.array_equal(over_http, mask), name
    for name in ("d_255", "d_255named"):
        dataset = open_dataset(sets / name)
        masks = [dataset.mask(s) for s in dataset.slices()]
        assert {int(v) for m in masks if m is not None for v in np.unique(m)} <= {0, *dataset.classes}, name


def test_generators_are_all_here() -> None:
    text = Path(__file__).read_text()
    kinds = {p.parent.name for p in CASES.glob("*/make.py")}
    assert kinds
    assert all(f'"{kind}"' in text for kind in kinds)
