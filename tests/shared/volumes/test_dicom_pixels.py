"""DICOM pixels of every kind and compression come out as pydicom decodes them; lying streams harm nobody."""

import io
import struct
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scans import dicom_slice, phantom, written

from vessa.errors import InvalidImage, TooLarge, VessaError
from vessa.volumes import Bounds, isolated, read_volume

PIXELS = phantom((40, 32, 2))[:, :, 1].T


def compressed(syntax):
    """A slice compressed by a library that is not the one that decodes it here, where there is one."""
    import imagecodecs

    encode = {
        RLELossless: None,
        JPEGLSLossless: imagecodecs.jpegls_encode,
        JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k"),
        JPEGLosslessSV1: lambda a: imagecodecs.ljpeg_encode(a, bitspersample=16),
        HTJ2KLossless: lambda a: imagecodecs.htj2k_encode(a, reversible=True),
    }[syntax]
    unsigned = PIXELS.astype(np.uint16)
    file = dicom_slice(unsigned, PixelRepresentation=0)
    if encode is None:
        file.compress(RLELossless)
        return written(file)
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = encapsulate([bytes(encode(unsigned))])
    file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", True
    return written(file)


SYNTAXES = [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1, HTJ2KLossless]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_lossless_compression_is_decoded(syntax):
    np.testing.assert_array_equal(read_volume([compressed(syntax)]).voxels[:, :, 0], PIXELS.T)


def test_a_deflated_file_is_inflated_in_the_child_process():
    file = dicom_slice(PIXELS)
    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    np.testing.assert_array_equal(read_volume([written(file)]).voxels[:, :, 0], PIXELS.T)


def test_a_file_without_transfer_syntax_is_read():
    data = written(dicom_slice(PIXELS))
    bare = data[132 + 12 + struct.unpack_from("<I", data, 140)[0] :]  # the data set alone
    np.testing.assert_array_equal(read_volume([bare]).voxels[:, :, 0], PIXELS.T)


def test_big_endian_is_read():
    file = dicom_slice(PIXELS)
    file.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    file.PixelData = np.ascontiguousarray(PIXELS, ">i2").tobytes()
    data = io.BytesIO()
    pydicom.dcmwrite(data, file, enforce_file_format=True)
    np.testing.assert_array_equal(read_volume([data.getvalue()]).voxels[:, :, 0], PIXELS.T)


def colored(kind, pixels, **more):
    file = dicom_slice(np.zeros(pixels.shape[:2]), PhotometricInterpretation=kind, SamplesPerPixel=3)
    file.PlanarConfiguration, file.BitsAllocated, file.BitsStored = 0, 8, 8
    file.HighBit, file.PixelRepresentation = 7, 0
    file.PixelData = pixels.astype(np.uint8).tobytes()
    for name, value in more.items():
        setattr(file, name, value)
    return file


RGB = np.stack([PIXELS % 200, PIXELS % 100, 255 - PIXELS % 200], -1).astype(np.uint8)


def test_color_is_read_as_rgb():
    image = read_volume([written(colored("RGB", RGB))]).image(2, 0)
    np.testing.assert_array_equal(image, RGB)
    gray = np.dstack([RGB[..., 0], np.full_like(RGB[..., 0], 128), np.full_like(RGB[..., 0], 128)])
    shown = read_volume([written(colored("YBR_FULL", gray))]).image(2, 0)
    np.testing.assert_array_equal(shown, np.repeat(RGB[..., :1], 3, -1))


def test_a_palette_becomes_rgb():
    file = dicom_slice(PIXELS % 4, PhotometricInterpretation="PALETTE COLOR", PixelRepresentation=0)
    table = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint16) * 257
    for i, name in enumerate(("Red", "Green", "Blue")):
        setattr(file, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 16])
        setattr(file, f"{name}PaletteColorLookupTableData", table[:, i].astype("<u2").tobytes())
    image = read_volume([written(file)]).image(2, 0)
    np.testing.assert_array_equal(image, (table // 257).astype(np.uint8)[PIXELS % 4])


def lut(descriptor, values):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = descriptor, np.asarray(values, "<u2").tobytes()
    return item


def test_lookup_tables_of_values_and_of_display_count():
    pixels = np.array([[0, 1], [2, 3]])
    modality = dicom_slice(pixels, PixelRepresentation=0)
    modality.ModalityLUTSequence = [lut([4, 0, 16], [10, 500, 20, 1000])]
    modality.ModalityLUTSequence[0].ModalityLUTType = "US"
    np.testing.assert_array_equal(read_volume([written(modality)]).voxels[:, :, 0].T, [[10, 500], [20, 1000]])
    voi = dicom_slice(pixels, PixelRepresentation=0)
    voi.VOILUTSequence = [lut([4, 0, 8], [0, 255, 51, 102])]
    np.testing.assert_array_equal(read_volume([written(voi)]).image(2, 0), [[0, 255], [51, 102]])


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_background_and_outside_the_shown_range(kind):
    pixels = PIXELS.copy()
    pixels[:4] = -2000
    volume = read_volume(
        [written(dicom_slice(pixels, PixelPaddingValue=-2000, PhotometricInterpretation=kind))]
    )
    assert volume.voxels.min() == -2000
    assert volume.shown[0] >= PIXELS.min()
    image = volume.image(2, 0)
    assert (image[:4] == 0).all()
    assert image[4:].max() == 255


def test_a_stream_that_lies_about_its_size_is_refused():
    data = bytearray(compressed(JPEG2000Lossless))
    place = data.index(b"\xff\x4f\xff\x51")
    struct.pack_into(">II", data, place + 8, 60_000, 60_000)
    with pytest.raises(InvalidImage):
        read_volume([bytes(data)])


def test_what_takes_too_much_memory_or_time_ends_with_an_error_and_the_next_file_is_read():
    file = dicom_slice(PIXELS)
    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    head = written(file)
    start = 132 + 12 + struct.unpack_from("<I", head, 140)[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(320)) + packer.flush()
    small = Bounds(voxels=10_000, pixels=10_000, slices=4)
    with pytest.raises((TooLarge, InvalidImage)):
        isolated.read_volume([head[:start] + bomb], small)
    large = np.zeros((4096, 4096), np.uint16)  # 32 MB are not read in a millisecond
    with pytest.raises(TooLarge, match="longer than 0.001 s"):
        isolated.read_volume([written(dicom_slice(large))], Bounds(), seconds=0.001)
    np.testing.assert_array_equal(
        isolated.read_volume([written(dicom_slice(PIXELS))], small).voxels[:, :, 0], PIXELS.T
    )


def test_a_decoder_that_crashes_ends_its_child_alone(monkeypatch):
    read = isolated.read_volume([compressed(RLELossless)], Bounds())
    child = isolated._idle[-1]
    child.process.kill()
    child.process.wait()
    np.testing.assert_array_equal(
        isolated.read_volume([compressed(RLELossless)], Bounds()).voxels, read.voxels
    )


def test_a_child_process_gives_back_what_this_process_would():
    files = [written(dicom_slice(PIXELS, PixelPaddingValue=5, WindowCenter=150, WindowWidth=90))]
    here, there = read_volume(files), isolated.read_volume(files, Bounds())
    np.testing.assert_array_equal(here.image(2, 0), there.image(2, 0))
    np.testing.assert_array_equal(here.affine, there.affine)
    assert (here.window, here.notes, here.headers[0]) == (there.window, there.notes, there.headers[0])
    with pytest.raises(VessaError, match="hello|expected one NIfTI"):
        isolated.read_volume([b"hello" * 100], Bounds())
