"""Volumes keep their geometry and their values through every format."""

import gzip
import io

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel.orientations import aff2axcodes
from scans import dicom_multiframe, dicom_series, dicom_slice, nifti, phantom, written

from vessa.errors import InvalidImage, InvalidRequest
from vessa.intensities import to_bytes
from vessa.volumes import Volume, is_volume, read_volume, write_labels

OBLIQUE = np.array(
    [[-1.9, 0.3, 0.2, 4.0], [0.3, 1.5, -0.4, -9.0], [-0.1, 0.4, 5.0, 30.0], [0, 0, 0, 1]], np.float32
)
AFFINES = {
    "RAS": np.diag([1.0, 2.0, 5.0, 1.0]),
    "LPS": np.diag([-1.0, -2.0, 5.0, 1.0]),
    "SLA": np.array([[0, -1.0, 0, 3], [0, 0, 2.0, 0], [4.0, 0, 0, 1], [0, 0, 0, 1]]),
    "oblique": OBLIQUE,
}


@pytest.mark.parametrize("name", AFFINES)
def test_labels_of_a_nifti_volume_lie_on_its_grid(name):
    voxels = phantom()
    volume = read_volume([gzip.compress(nifti(voxels, AFFINES[name]))])
    np.testing.assert_array_equal(volume.voxels, voxels)
    labels = (voxels > 200).astype(np.uint8)
    back = nib.Nifti1Image.from_bytes(
        gzip.decompress(write_labels(volume, labels, {1: "block"}, "nano", "nifti"))
    )
    np.testing.assert_allclose(back.affine, AFFINES[name], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(back.dataobj), labels)
    assert back.get_data_dtype() == np.uint8


@pytest.mark.parametrize(
    ("affine", "codes", "axes"),
    [
        ("RAS", "RAS", (0, 1, 2)),
        ("LPS", "LPS", (0, 1, 2)),
        ("SLA", "SLA", (1, 2, 0)),
        ("oblique", "LAS", (0, 1, 2)),
    ],
)
def test_axes_are_found_by_anatomy(affine, codes, axes):
    volume = Volume(phantom().astype(np.float32), np.asarray(AFFINES[affine], np.float64))
    assert "".join(aff2axcodes(volume.affine)) == codes
    assert tuple(volume.axis(n) for n in ("sagittal", "coronal", "axial")) == axes
    with pytest.raises(InvalidRequest, match="sagittal, coronal, axial, got 'up'"):
        volume.axis("up")


def test_slices_are_cut_where_they_lie_farthest_apart_else_where_they_are_fewest():
    voxels = np.zeros((4, 9, 7), np.float32)
    assert Volume(voxels, np.diag([1.0, 3.0, 2.0, 1.0])).axis() == 1
    assert Volume(voxels, np.eye(4)).axis() == 0
    assert Volume(np.zeros((5, 5, 5), np.float32), np.eye(4)).axis() == 2
    assert Volume(np.zeros((9, 8, 1), np.float32), np.diag([4.0, 4.0, 3.0, 1.0])).axis() == 2  # one slice


def test_the_images_of_a_dicom_stay_whole_however_thin_they_are():
    files = [written(file) for file in dicom_series(phantom(), step=0.1)]
    assert read_volume(files).axis() == 2


def test_a_nifti_in_other_units_is_read_in_mm():
    voxels, affine = phantom(), np.diag([50.0, 60.0, 70.0, 1.0])
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("micron")
    volume = read_volume([image.to_bytes()])
    np.testing.assert_allclose(volume.affine, np.diag([0.05, 0.06, 0.07, 1.0]))


def test_a_slice_shows_the_volumes_range_with_rows_along_the_later_axis():
    voxels = phantom().astype(np.float32)
    volume = Volume(voxels, np.eye(4))
    np.testing.assert_array_equal(volume.image(1, 4), to_bytes(voxels)[:, 4, :].T)


def test_a_dicom_series_is_sorted_along_its_normal_and_rescaled():
    voxels = phantom()
    files = dicom_series(voxels, RescaleSlope=2, RescaleIntercept=-1000)
    volume = read_volume([written(files[k]) for k in (3, 0, 5, 1, 4, 2)])
    np.testing.assert_array_equal(volume.voxels, voxels * 2.0 - 1000)
    np.testing.assert_allclose(volume.spacing, (0.7, 0.5, 3.0))
    # pixel (column 2, row 3) of slice 4, by PS3.3 C.7.6.2.1.1, x and y turned from LPS to RAS
    place = (
        np.array(files[4].ImagePositionPatient)
        + 2 * 0.7 * np.array([0.8, 0.6, 0])
        + 3 * 0.5 * np.array([0, 0, -1.0])
    )
    np.testing.assert_allclose((volume.affine @ [2, 3, 4, 1])[:3], place * [-1, -1, 1], atol=1e-9)


def test_labels_of_a_dicom_series_are_a_dicom_seg_on_its_grid():
    voxels = phantom()
    files = dicom_series(voxels)
    volume = read_volume([written(f) for f in reversed(files)])
    labels = np.where(voxels > 250, 3, np.where(voxels > 200, 1, 0)).astype(np.uint8)
    labels[:, :, 5] = 0
    seg = hd.seg.segread(
        io.BytesIO(write_labels(volume, labels, {1: "wall", 3: "cavity"}, "nano", "dicom-seg"))
    )
    assert [seg.get_segment_description(n).segment_label for n in (1, 2)] == ["wall", "cavity"]
    assert seg.FrameOfReferenceUID == "1.2.9"
    assert seg.PatientID == "p1"
    scan = hd.get_volume_from_series(files)
    found = seg.get_volume(combine_segments=True).match_geometry(scan)
    segments = np.array([0, 1, 0, 2])[labels].transpose(2, 1, 0)
    places = [scan.map_indices_to_reference(np.array([[k, 0, 0]]))[0] for k in range(6)]
    here = {tuple(place.round(3)): k for k, place in enumerate(places)}
    order = [here[tuple(np.round(f.ImagePositionPatient, 3))] for f in files]
    np.testing.assert_array_equal(found.array[order], segments)


def test_a_multiframe_dicom_is_one_volume_and_its_seg_refers_to_its_frames():
    voxels = phantom()
    file = dicom_multiframe(voxels)
    volume = read_volume([written(file)])
    np.testing.assert_array_equal(volume.voxels, voxels)
    series = read_volume([written(f) for f in dicom_series(voxels)])
    np.testing.assert_allclose(volume.affine, series.affine)
    labels = (voxels > 200).astype(np.uint8)
    seg = hd.seg.segread(io.BytesIO(write_labels(volume, labels, {1: "block"}, "nano", "dicom-seg")))
    found = seg.get_pixels_by_source_frame(file.SOPInstanceUID, [1, 6], combine_segments=True)
    np.testing.assert_array_equal(found, labels[:, :, [5, 0]].transpose(2, 1, 0))


def test_a_series_without_any_label_is_still_a_dicom_seg():
    voxels = phantom()
    volume = read_volume([written(f) for f in dicom_series(voxels)])
    data = write_labels(volume, np.zeros(voxels.shape, np.uint8), {1: "block"}, "nano", "dicom-seg")
    assert not hd.seg.segread(io.BytesIO(data)).pixel_array.any()


@pytest.mark.parametrize(("function", "shown"), [("LINEAR", (99.5, 298.5)), ("LINEAR_EXACT", (99.0, 299.0))])
def test_a_dicoms_window_is_what_is_shown_and_monochrome1_is_turned(function, shown):
    pixels = np.array([[0, 99], [199, 400]])
    window = {
        "WindowCenter": 199 + (function == "LINEAR") * 0.5,
        "WindowWidth": 200,
        "VOILUTFunction": function,
    }
    plain = read_volume([written(dicom_slice(pixels, **window))])
    assert plain.shown == shown
    turned = read_volume([written(dicom_slice(pixels, PhotometricInterpretation="MONOCHROME1", **window))])
    image = plain.image(2, 0)
    assert (image[0, 0], image[1, 1]) == (0, 255)
    np.testing.assert_array_equal(turned.image(2, 0), 255 - image)


def test_different_windows_within_a_series_give_way_to_the_volumes_range():
    files = dicom_series(phantom(), WindowCenter=100, WindowWidth=50)
    assert read_volume([written(f) for f in files]).window == (75.0, 124.0)
    files[2].WindowCenter = 300
    assert read_volume([written(f) for f in files]).window is None


def test_a_folder_of_files_is_a_series_and_other_files_in_it_do_not_matter(tmp_path):
    for index, file in enumerate(dicom_series(phantom())):
        (tmp_path / f"IM{index}").write_bytes(written(file))
    (tmp_path / "notes.txt").write_text("hello")
    assert is_volume(tmp_path)
    assert read_volume(tmp_path).shape == (12, 10, 6)
    assert not is_volume(tmp_path / "notes.txt")
    with pytest.raises(InvalidImage, match="expected one NIfTI file"):
        read_volume(tmp_path / "notes.txt")


def test_rle_compressed_dicom_is_decoded_and_an_unknown_compression_named():
    pixels = phantom()[:, :, 3].T
    file = dicom_slice(pixels)
    file.compress(pydicom.uid.RLELossless)
    np.testing.assert_array_equal(read_volume([written(file)]).voxels[:, :, 0], pixels.T)
    file.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
    with pytest.raises(InvalidImage, match="compressed by MPEG-4.*Convert it first"):
        read_volume([written(file)])
