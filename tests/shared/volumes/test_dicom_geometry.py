"""DICOM slices and frames lie where ITK puts them; what is left out of a folder is counted and named."""

import gzip
import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import NuclearMedicineImageStorage, RTDoseStorage
from scans import dicom_series, dicom_slice, phantom, written

from vessa.errors import InvalidImage, InvalidRequest
from vessa.volumes import check_dicom_seg, read_volume, write_labels
from vessa.volumes.dicom.series import find_series

AXIAL = (1, 0, 0, 0, 1, 0)
CORONAL = (0, 1, 0, 0, 0, -1)


def classic(voxels, **more):
    """A multi-frame file of the classic kind: position and orientation are stated once."""
    file = dicom_slice(voxels[:, :, 0].T, position=(-30, -40, 10), orientation=CORONAL)
    file.NumberOfFrames = voxels.shape[2]
    file.PixelData = np.ascontiguousarray(voxels.transpose(2, 1, 0), "<i2").tobytes()
    for name, value in more.items():
        setattr(file, name, value)
    return file


def spect(voxels):
    file = classic(voxels, SpacingBetweenSlices=5, Modality="NM", FrameIncrementPointer=0x00540080)
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = NuclearMedicineImageStorage
    file.ImageType, file.SliceVector = ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"], list(range(1, 7))
    file.NumberOfSlices = voxels.shape[2]
    detector = Dataset()
    detector.ImagePositionPatient = file.ImagePositionPatient
    detector.ImageOrientationPatient = file.ImageOrientationPatient
    del file.ImagePositionPatient, file.ImageOrientationPatient
    file.DetectorInformationSequence = [detector]
    return file


def dose(voxels):
    file = classic(voxels, DoseGridScaling=0.5, GridFrameOffsetVector=[4.0 * k for k in range(6)])
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = RTDoseStorage
    file.Modality, file.PixelRepresentation = "RTDOSE", 0
    del file.RescaleSlope, file.RescaleIntercept
    return file


def corners(read):
    ends = itertools.product(*((0.0, size - 1.0) for size in read.GetSize()))
    return np.array([read.TransformContinuousIndexToPhysicalPoint(list(end)) for end in ends])


@pytest.mark.parametrize(
    "file",
    [classic(phantom(), SpacingBetweenSlices=5), spect(phantom()), dose(phantom())],
    ids=["cone beam", "spect", "dose"],
)
def test_a_classic_multi_frame_file_lies_where_itk_puts_it(file, tmp_path):
    (tmp_path / "image.dcm").write_bytes(written(file))
    volume = read_volume(tmp_path / "image.dcm")
    for name, kind in (("labels.nii.gz", "nifti"), ("labels.seg.nrrd", "nrrd")):
        (tmp_path / name).write_bytes(
            write_labels(volume, np.ones(volume.shape, np.uint8), {1: "a"}, "", kind)
        )
        image, labels = sitk.ReadImage(str(tmp_path / "image.dcm")), sitk.ReadImage(str(tmp_path / name))
        np.testing.assert_allclose(corners(labels), corners(image), atol=1e-4)
    np.testing.assert_allclose(sitk.GetArrayFromImage(image).transpose(2, 1, 0), volume.voxels, rtol=1e-6)


def test_the_sign_of_the_distance_between_frames_counts():
    up, down = (read_volume([written(classic(phantom(), SpacingBetweenSlices=s))]) for s in (5, -5))
    shift = up.affine[:3, 2]
    assert abs(shift).max() == 5
    assert (shift == (down.affine @ [0, 0, -1, 1] - down.affine @ [0, 0, 0, 1])[:3]).all() or np.allclose(
        up.affine[:3, 3] - down.affine[:3, 3], 5 * shift
    )


def test_frames_in_time_and_frames_without_a_place_are_said():
    cine = classic(phantom(), FrameTime=40, FrameIncrementPointer=0x00181063)
    volume = read_volume([written(cine)])
    assert "differ in time" in " ".join(volume.notes)
    bare = classic(phantom(), SpacingBetweenSlices=5)
    del bare.ImagePositionPatient, bare.FrameOfReferenceUID
    volume = read_volume([written(bare)])
    with pytest.raises(InvalidImage, match="ImagePositionPatient.*Ask for NIfTI"):
        check_dicom_seg(volume)


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, (0.8, 0.6, 0, 0, 0, -1), (-1, 0, 0, 0, -1, 0)])
def test_a_series_lies_where_itk_puts_it(orientation, tmp_path):
    files = dicom_series(phantom(), orientation=orientation)
    for index, file in enumerate(files):
        (tmp_path / f"{index}.dcm").write_bytes(written(file))
    volume = read_volume(tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    np.testing.assert_allclose(
        sorted(map(tuple, corners(reader.Execute()).round(3))),
        sorted(
            tuple((volume.affine @ [*end, 1])[:3].round(3) * [-1, -1, 1])
            for end in itertools.product((0, 11), (0, 9), (0, 5))
        ),
        atol=2e-3,
    )


def test_what_scanners_round_to_is_tolerated():
    files = dicom_series(phantom((12, 10, 12)), orientation=AXIAL, step=0.625)
    for k, file in enumerate(files):
        file.ImagePositionPatient = [-30, -40, round(10 + 0.625 * k, 1)]
    assert read_volume([written(f) for f in files]).spacing[2] == pytest.approx(0.625, abs=0.01)
    rounded = dicom_series(phantom(), orientation=(0.71, 0, -0.71, 0, 1, 0))
    affine = read_volume([written(f) for f in rounded]).affine
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-6)
    tiny = dicom_series(phantom(), orientation=AXIAL, step=0.0005)
    assert read_volume([written(f) for f in tiny]).spacing[2] == pytest.approx(0.0005)


def test_a_tilted_gantry_is_said_and_its_labels_are_a_dicom_seg():
    files = dicom_series(phantom(), orientation=AXIAL)
    for k, file in enumerate(files):
        file.ImagePositionPatient = [-30, -40 + 1.1 * k, 10 + 3.0 * k]
    volume = read_volume([written(f) for f in files])
    assert "20.1 degrees (tilted gantry)" in volume.notes[0]
    check_dicom_seg(volume)


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


RAW = [written(file) for file in dicom_series(phantom())]


@pytest.mark.parametrize(
    "files",
    [
        {f"IM{i}.DCM": data[132:] if i % 2 else data for i, data in enumerate(RAW)},  # without preamble
        {f"IM{i}": data[132:] for i, data in enumerate(RAW)},
        {f"{i}.gz": gzip.compress(data) if i > 3 else data for i, data in enumerate(RAW)},
        {"DICOMDIR": b"x", "notes.txt": b"hello", **{str(i): data for i, data in enumerate(RAW)}},
    ],
)
def test_every_slice_of_a_folder_is_read(files, tmp_path):
    volume = read_volume(put(tmp_path / "DICOM" / "ST1" / "SE1", files).parents[2])
    np.testing.assert_array_equal(volume.voxels, phantom())
    if "notes.txt" in files:
        assert volume.notes == (
            "1 files are no DICOM images and were left out: notes.txt (of an unknown kind)",
        )


def test_a_slice_that_is_empty_or_damaged_is_an_error_that_names_it(tmp_path):
    put(tmp_path, {str(i): data for i, data in enumerate(RAW)} | {"5": b"", "4": b"\0" * 500})
    with pytest.raises(InvalidImage, match=r"2 of 6 files .*4 \(of an unknown kind\), 5 \(empty\)"):
        read_volume(tmp_path)
    put(tmp_path, {"4": RAW[4][:-40], "5": RAW[5]})
    with pytest.raises(InvalidImage, match="^4: the DICOM pixels cannot be decoded"):
        read_volume(tmp_path)


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    put(tmp_path / "a", {str(i): data for i, data in enumerate(RAW)})
    put(tmp_path / "b", {"0": written(dicom_slice(np.ones((7, 8)), uid="1.2.3.9", SeriesNumber=4))})
    with pytest.raises(InvalidRequest, match=r"2 DICOM series.*\n  1: 6 files, CT.*in a\n  2: 1 files.*in b"):
        read_volume(tmp_path)
    assert read_volume(tmp_path, series=2).shape == (8, 7, 1)
    assert [len(one.files) for one in find_series(tmp_path).series] == [6, 1]
    with pytest.raises(InvalidRequest, match="there is no series 3"):
        read_volume(tmp_path, series=3)


def test_the_scale_of_a_dose_grid_changes_nothing_that_is_shown():
    shown = []
    for scaling in ("0.001", "1"):
        dose = dicom_slice(phantom()[:, :, 0].T, Modality="RTDOSE", DoseGridScaling=scaling)
        dose.SOPClassUID = dose.file_meta.MediaStorageSOPClassUID = RTDoseStorage
        del dose.RescaleSlope, dose.RescaleIntercept
        shown.append(read_volume([written(dose)]).image(2, 0))
    assert np.array_equal(*shown)
