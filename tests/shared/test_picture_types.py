"""Pictures as cameras, microscopes and scanners write them: the scene is visible, or the kind is named."""

import io
import logging

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from vessa.errors import InvalidImage
from vessa.images import decode_picture
from vessa.intensities import to_bytes
from vessa.volumes import isolated

ROWS, COLUMNS = np.mgrid[:48, :64]
DISK = (ROWS - 24) ** 2 + (COLUMNS - 32) ** 2 < 15**2
DEEP = (200 + COLUMNS * 16 + DISK * 2500).clip(0, 4095).astype(np.uint16)  # a scene of 12 bits
SHOWN = to_bytes(DEEP.astype(np.float32))
COLOR = np.repeat(DEEP[..., None], 3, 2)


def tiff(pixels, **options):
    data = io.BytesIO()
    tifffile.imwrite(data, pixels, **options)
    return data.getvalue()


def pillow(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


SAME = {
    "gray 16-bit PNG": imagecodecs.png_encode(DEEP),
    "gray 16-bit PNG with alpha": imagecodecs.png_encode(np.stack([DEEP, np.full_like(DEEP, 65535)], -1)),
    "RGB 16-bit PNG": imagecodecs.png_encode(COLOR),
    "gray TIFF": tiff(DEEP),
    "big-endian TIFF": tiff(DEEP, byteorder=">"),
    "BigTIFF": tiff(DEEP, bigtiff=True),
    "RGB TIFF": tiff(COLOR, photometric="rgb"),
    "planar RGB TIFF": tiff(np.moveaxis(COLOR, -1, 0), photometric="rgb", planarconfig="separate"),
    "signed 16-bit TIFF": tiff((DEEP.astype(np.int32) - 1024).astype(np.int16)),
    "32-bit TIFF": tiff(DEEP.astype(np.uint32) * 100_000),
    "float TIFF": tiff(DEEP.astype(np.float32)),
    "double TIFF": tiff(DEEP.astype(np.float64)),
    "MinIsWhite 16-bit TIFF": tiff(65535 - DEEP * 16, photometric="miniswhite"),
    "tiled TIFF": tiff(DEEP, tile=(32, 32), compression="zlib"),
    "float TIFF with predictor": tiff(DEEP.astype(np.float32), compression="zlib", predictor=True),
    **{f"{name} TIFF": tiff(DEEP, compression=name) for name in ("lzw", "zstd", "lzma", "packbits", "lerc")},
    **{f"{name} TIFF": tiff(DEEP, compression=name) for name in ("jpeg2000", "jpegxl")},
}


@pytest.mark.parametrize("name", SAME)
def test_deep_pictures_show_the_scene_over_the_whole_range(name):
    pixels = decode_picture(SAME[name])
    gray = pixels if pixels.ndim == 2 else pixels[..., 0]
    assert np.abs(gray.astype(int) - SHOWN).max() <= 1


def test_half_floats_and_signed_bytes_are_scaled():
    half = decode_picture(tiff((DEEP / 4096).astype(np.float16)))
    assert np.corrcoef(half.ravel(), SHOWN.ravel())[0, 1] > 0.9999
    signed = decode_picture(tiff((DISK * 100 - 50).astype(np.int8)))
    assert (signed[DISK] == 255).all()
    assert (signed[~DISK] == 0).all()


def test_pictures_of_8_bits_stay_as_they_are():
    eight = (DEEP >> 4).astype(np.uint8)
    assert np.array_equal(decode_picture(tiff(eight)), eight)
    assert np.array_equal(decode_picture(tiff(255 - eight, photometric="miniswhite")), eight)
    rgb = np.repeat(eight[..., None], 3, 2)
    planar = tiff(np.moveaxis(rgb, -1, 0), photometric="rgb", planarconfig="separate")
    assert np.array_equal(decode_picture(planar), rgb)
    bits = decode_picture(pillow(Image.fromarray(DISK), "PNG"))
    assert np.array_equal(bits, DISK * np.uint8(255))


def test_pixels_that_are_no_number_become_background_with_a_word(caplog):
    holes = DEEP.astype(np.float32)
    holes[:, :5] = np.nan
    with caplog.at_level(logging.WARNING):
        pixels = decode_picture(tiff(holes), what="scan.tif")
    assert (pixels[:, :5] == 0).all()
    assert pixels.max() == 255
    assert "scan.tif: 240 pixels are NaN or infinite" in caplog.text


def test_the_preview_of_a_camera_is_no_second_image():
    picture = Image.fromarray((COLOR >> 4).astype(np.uint8))
    options = {"save_all": True, "append_images": [picture.resize((32, 24))], "quality": 95}
    camera, plain = pillow(picture, "MPO", **options), pillow(picture, "JPEG", quality=95)
    assert np.array_equal(decode_picture(camera), decode_picture(plain))
    preview = io.BytesIO()
    with tifffile.TiffWriter(preview) as writer:
        writer.write(DEEP)
        writer.write(DEEP[::4, ::4], subfiletype=1)
    assert np.array_equal(decode_picture(preview.getvalue()), SHOWN)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(np.stack([DEEP] * 5)), "several frames|5 planes"),
        (tiff(np.stack([DEEP] * 5), truncate=True), "TIFF stack of 5 planes; expected one. Save each"),
        (tiff(np.stack([DEEP] * 5), imagej=True), "several frames|5 planes"),
        (tiff(np.stack([DEEP, DEEP], -1), photometric="minisblack", planarconfig="contig"), "2 channels"),
        (tiff(DEEP.astype(np.complex64)), "complex64 pixels.*Save it as gray or RGB"),
        (b"\x5c\x01\0\0" + bytes(340) + b"n+1\0" + bytes(100), "NIfTI volume. Send volumes to POST /jobs"),
        (b"NRRD0005\n", "NRRD volume"),
        (pillow(Image.fromarray(DISK), "BMP"), "a BMP file"),
    ],
)
def test_what_is_no_single_picture_is_named(data, message):
    with pytest.raises(InvalidImage, match=message):
        decode_picture(data)


def test_a_tiff_decoded_in_a_child_process_is_the_same():
    data = SAME["jpegxl TIFF"]
    assert np.array_equal(isolated.decode_picture(data, 1 << 20, "the image", []), decode_picture(data))
