"""Labels lie where their NIfTI image lies, for readers by qform (ITK) and by sform (nibabel)."""

import gzip
import itertools
import re
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from vessa.errors import InvalidImage
from vessa.volumes import read_volume, write_labels

VOXELS = (np.add.outer(np.add.outer(np.arange(8) * 3, np.arange(10) * 2), np.arange(5) * 10)).astype(np.int16)
QFORM = np.array([[1.5, 0, 0, -30], [0, 1.5, 0, -33], [0, 0, 5, -15], [0, 0, 0, 1]])
ANGLE = 0.35
TURNED = np.array(
    [
        [1.5 * np.cos(ANGLE), -1.5 * np.sin(ANGLE), 0, -12],
        [1.5 * np.sin(ANGLE), 1.5 * np.cos(ANGLE), 0, -40],
        [0, 0, 5, 20],
        [0, 0, 0, 1],
    ]
)
FLIPPED = np.diag([-1.5, 1.5, -5.0, 1.0])
SHEARED = QFORM + np.array([[0, 0, 1.2, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def image(qform=None, sform=None, codes=(0, 0), units="mm", voxels=VOXELS):
    made = nib.Nifti1Image(voxels, None)
    made.header.set_zooms((1.5, 1.5, 5.0, 1.0, 1.0)[: voxels.ndim])
    if qform is not None:
        made.set_qform(qform, codes[0])
    if sform is not None:
        made.set_sform(sform, codes[1])
    made.header.set_xyzt_units(units)
    return made.to_bytes()


def patched(data, offset, form, *values):
    raw = bytearray(data)
    struct.pack_into(form, raw, offset, *values)
    return bytes(raw)


def labels_of(data):
    volume = read_volume([data])
    return volume, write_labels(volume, np.ones(volume.shape, np.uint8), {1: "a"}, "", "nifti")


def corners(path):
    read = sitk.ReadImage(str(path))
    ends = itertools.product(*((0.0, size - 1.0) for size in read.GetSize()))
    return np.array([read.TransformContinuousIndexToPhysicalPoint(list(end)) for end in ends])


CASES = {
    "forms that differ": image(QFORM, TURNED, (1, 2)),
    "forms that differ, both scanner": image(QFORM, TURNED, (1, 1)),
    "qform alone": image(QFORM, codes=(1, 0)),
    "neither": image(),
    "flipped": image(FLIPPED, FLIPPED, (1, 1)),
    "micron": image(QFORM, QFORM, (1, 1), units="micron"),
    "two axes": image(QFORM, QFORM, (1, 1), voxels=VOXELS[:, :, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_labels_coincide_with_their_image_in_itk_and_in_nibabel(name, tmp_path):
    source = CASES[name]
    _, labels = labels_of(source)
    (tmp_path / "image.nii").write_bytes(source)
    (tmp_path / "labels.nii.gz").write_bytes(labels)
    sitk.ProcessObject.GlobalWarningDisplayOff()
    np.testing.assert_array_equal(corners(tmp_path / "image.nii"), corners(tmp_path / "labels.nii.gz"))
    one, other = nib.load(tmp_path / "image.nii"), nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(one.affine, other.affine)
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(one.header[field], other.header[field])
    assert other.shape == one.shape
    assert (np.asarray(other.dataobj) == 1).all()
    assert other.get_data_dtype() == np.uint8


def test_a_sheared_sform_is_kept(tmp_path):
    source = image(QFORM, SHEARED, (1, 2))
    _, labels = labels_of(source)
    back = nib.Nifti1Image.from_bytes(gzip.decompress(labels))
    np.testing.assert_allclose(back.affine, SHEARED, atol=1e-5)
    np.testing.assert_allclose(back.get_qform(), QFORM, atol=1e-5)


def test_labels_take_over_geometry_and_nothing_of_a_patient():
    made = nib.Nifti1Image(VOXELS, QFORM)
    made.header["descrip"], made.header["aux_file"], made.header["db_name"] = b"Mueller", b"Mueller", b"M"
    _, labels = labels_of(made.to_bytes())
    assert b"Mueller" not in gzip.decompress(labels)


PLAIN = image(QFORM, QFORM, (1, 1))


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (patched(image(QFORM, codes=(1, 0)), 76, "<f", 0.0), None),  # qfac
        (patched(image(QFORM, codes=(1, 0)), 76, "<4f", 1, 1.5, 1.5, 0), "voxel size .* is read as 1"),
        (patched(PLAIN, 123, "<B", 255), "unknown unit 7"),
        (patched(PLAIN, 123, "<B", 4), "unknown unit 4"),
        (patched(PLAIN, 123, "<B", 0), None),
        (patched(PLAIN, 108, "<f", 0.0), "at byte 0, inside the header"),
        (patched(PLAIN, 252, "<hh", 1, 7), None),  # a code that no reader knows
        (PLAIN + bytes(100), None),
        (gzip.compress(PLAIN)[:-4], None),  # without its checksum
        (b"".join(gzip.compress(PLAIN[i : i + 300]) for i in range(0, len(PLAIN), 300)), None),
        (image(), "neither qform nor sform"),
        (image(QFORM, QFORM, (1, 1), voxels=VOXELS[..., None, None]), None),
    ],
)
def test_headers_that_other_readers_forgive_are_read(data, note):
    volume = read_volume([data])
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    if note is None:
        assert volume.notes == ()
    else:
        assert len(volume.notes) == 1
        assert re.search(note, volume.notes[0])


def test_voxels_that_are_no_number_are_background_with_a_note():
    holes = VOXELS.astype(np.float32)
    holes[:3] = np.nan
    volume = read_volume([nib.Nifti1Image(holes, QFORM).to_bytes()])
    assert (volume.voxels[:3] == 9).all()
    assert volume.notes == ("150 voxels are NaN or infinite; they are read as background (9)",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(gzip.compress(PLAIN)), "gzip of a NIfTI|compressed twice"),
        (image(QFORM, QFORM, (1, 1), voxels=np.stack([VOXELS] * 2, -1)), "save one of its 2 volumes"),
        (nib.Nifti1Image(VOXELS * 1e300, QFORM, dtype="float64").to_bytes(), "beyond 3.4e38"),
    ],
)
def test_other_nifti_is_refused_with_the_way_on(data, message):
    with pytest.raises(InvalidImage, match=message):
        read_volume([data])
