"""Unusable volumes are refused with a reason before large allocations."""

import gzip
import struct
import tracemalloc

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import dicom_multiframe, dicom_series, dicom_slice, nifti, phantom, written

from vessa.errors import InvalidImage, InvalidRequest, TooLarge, VessaError
from vessa.volumes import Bounds, read_volume, write_labels

SMALL = Bounds(voxels=10_000, pixels=1_000, slices=8)


def changed(data, offset, form, *values):
    raw = bytearray(data)
    struct.pack_into(form, raw, offset, *values)
    return bytes(raw)


NIFTI = nifti(phantom(), np.eye(4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (NIFTI[:1000], "cut off"),
        (gzip.compress(NIFTI)[:200], "damaged or cut off"),
        (changed(NIFTI, 108, "<f", 1e9), "offset"),
        (changed(NIFTI, 108, "<f", float("nan")), "offset"),
        (changed(NIFTI, 344, "4s", b"ni1\\0"), "pair of files"),
        (changed(NIFTI, 42, "<h", -3), "1 or more|contradict"),
        (changed(NIFTI, 40, "<h", 9), "contradict|axes"),
        (changed(NIFTI, 70, "<h", 128), "colors"),
        (changed(NIFTI, 70, "<h", 32), "complex"),
        (changed(NIFTI, 280, "<f", float("inf")), "geometry"),
        (nifti(np.zeros((3, 4, 5, 6), np.uint8), np.eye(4)), "4 axes"),
        (nifti(np.full((3, 4, 5), np.nan, np.float32), np.eye(4)), "no voxel that is a finite number"),
        (b"hello" * 100, "expected one NIfTI"),
    ],
)
def test_damaged_nifti(data, message):
    with pytest.raises(InvalidImage, match=message):
        read_volume([data], SMALL)


@pytest.mark.parametrize("sizes", [(3000, 3, 3), (30000, 30000, 30000), (12, 10, 9), (30, 30, 8)])
def test_a_nifti_bomb_is_refused_by_its_header(sizes):
    bounds = Bounds(voxels=7000, pixels=2000, slices=8)
    data = gzip.compress(changed(NIFTI, 42, "<hhh", *sizes)[:352] + bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="limit|more than"):
            read_volume([data], bounds)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def series(**more):
    return dicom_series(phantom(), **more)


def with_change(index, **values):
    files = series()
    for name, value in values.items():
        setattr(files[index], name, value)
    return files


def without_rows(modality):
    file = dicom_slice(np.zeros((4, 4)), Modality=modality)
    del file.Rows
    return file


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (series()[:3] + series(uid="1.2.3.5")[3:], "of 2 series"),
        (with_change(2, FrameOfReferenceUID="9.9"), "2 frames of reference"),
        (with_change(2, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "orientation"),
        (with_change(2, PixelSpacing=[1, 1]), "pixel spacing"),
        (with_change(2, ImagePositionPatient=series()[1].ImagePositionPatient), "in one place"),
        (series()[:2] + series()[3:], "missing: 1 of 4 gaps.*after slice 2"),
        ([*series(), dicom_multiframe(phantom())], "several frames itself"),
        ([dicom_slice(np.zeros((4, 4)), PhotometricInterpretation="RGB")], "RGB of 1 samples"),
        ([dicom_slice(np.zeros((4, 4)), BitsAllocated=12)], "12 bits a sample"),
        ([without_rows("SR")], "modality SR"),
        ([dicom_slice(np.zeros((4, 4)), Rows=5)], "do not fill"),
        ([dicom_slice(np.zeros((4, 4)), Rows=0)], "0 rows"),
        ([dicom_slice(np.zeros((4, 4)), ImageOrientationPatient=[1, 0, 0, 1, 0, 0])], "right angle"),
        ([dicom_slice(np.zeros((4, 4)), ModalityLUTSequence=[pydicom.Dataset()])], "cannot be decoded"),
        ([dicom_slice(np.zeros((4, 4)), Modality="SEG")], "segmentation .SEG., not an image"),
    ],
)
def test_dicom_that_is_no_volume(files, message):
    with pytest.raises(InvalidImage, match=message):
        read_volume([written(file) for file in files], Bounds())


def test_an_axis_that_labels_could_not_have_is_refused():
    with pytest.raises(TooLarge, match="an axis of 40000"):
        Bounds().check((40000, 2, 2), "NIfTI file")


def test_a_dicom_bomb_is_refused_by_its_header():
    for values in ({"Rows": 60000, "Columns": 60000}, {"NumberOfFrames": 2_000_000_000}):
        with pytest.raises((TooLarge, InvalidImage)):
            read_volume([written(dicom_slice(np.zeros((4, 4)), **values))], SMALL)
    with pytest.raises(TooLarge, match="9 files"):
        read_volume([written(dicom_slice(np.zeros((4, 4))))] * 9, SMALL)


def test_a_compressed_frame_that_is_larger_than_declared_is_not_decoded():
    file = dicom_slice(np.zeros((64, 64)))
    file.compress(pydicom.uid.RLELossless)
    file.Rows = file.Columns = 2
    with pytest.raises(InvalidImage, match="do not fill the declared size|header declares"):
        read_volume([written(file)])


def test_errors_hold_neither_paths_nor_a_patients_data(tmp_path):
    for name, data in (("a.nii", NIFTI[:900]), ("b.dcm", written(dicom_slice(np.zeros((4, 4)), Rows=9)))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidImage) as error:
            read_volume(tmp_path / name)
        assert not any(word in str(error.value) for word in (str(tmp_path), "Nobody", "p1", "Error"))


def test_a_nifti_volume_has_no_dicom_seg():
    volume = read_volume([NIFTI])
    with pytest.raises(InvalidRequest, match="refers to DICOM"):
        write_labels(volume, np.zeros(volume.shape, np.uint8), {1: "a"}, "nano", "dicom-seg")


def test_a_dicom_without_identifiers_has_no_dicom_seg():
    file = dicom_slice(np.zeros((4, 4)))
    del file.StudyInstanceUID
    volume = read_volume([written(file)])
    with pytest.raises(InvalidImage, match="by StudyInstanceUID, which the DICOM file lacks.*Ask for NIfTI"):
        write_labels(volume, np.zeros(volume.shape, np.uint8), {1: "a"}, "nano", "dicom-seg")


GOOD = [NIFTI, gzip.compress(NIFTI), written(series()[0]), written(dicom_multiframe(phantom()))]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), max_size=4),
    st.integers(0, 4000),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, about values; the service logs none of them
def test_any_damage_is_an_error_of_ours(data, changes, length):
    raw = bytearray(data)
    for offset, value in changes:
        raw[offset : offset + len(value)] = value
    try:
        volume = read_volume([bytes(raw[: length or None])], SMALL)
    except VessaError:
        return
    assert volume.image(volume.axis(), 0).dtype == np.uint8
