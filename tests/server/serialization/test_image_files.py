"""Image files from strangers: read right, or refused early, cheaply and in words of our own."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vessa.codec import image_digest
from vessa.errors import InvalidImage, ShapeMismatch, TooLarge, UnknownClass, VessaError
from vessa.images import read_image
from vessa.masks.colors import class_color
from vessa_server.serialization.fields import read_per_class
from vessa_server.serialization.image_files import decode_image, decode_mask, label_png
from vessa_server.serialization.overlays import overlay_png

LIMIT = 100_000
GRAY = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
COLOR = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=-1)
IDS = (GRAY % 3).astype(np.uint8)


def save(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_pixels_come_back_as_they_were(kind: str) -> None:
    assert np.array_equal(decode_image(save(GRAY, kind), LIMIT), GRAY)
    assert np.array_equal(decode_image(save(COLOR, kind), LIMIT), COLOR)


def test_transparency_is_dropped_and_palettes_become_colors() -> None:
    alpha = np.dstack([COLOR, GRAY])
    assert np.array_equal(decode_image(save(alpha), LIMIT), COLOR)
    assert np.array_equal(decode_image(save(Image.fromarray(GRAY).convert("LA")), LIMIT), GRAY)
    assert decode_image(save(Image.fromarray(COLOR).convert("P")), LIMIT).shape == (30, 40, 3)
    assert decode_image(save(Image.fromarray(COLOR).convert("CMYK"), "JPEG"), LIMIT).shape == (30, 40, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_images_are_scaled_by_their_percentiles(dtype: Any) -> None:
    deep = np.linspace(500, 30000, 1200).reshape(30, 40).astype(dtype)
    deep[0, 0] = 65000
    pixels = decode_image(save(deep, "TIFF"), LIMIT)
    assert pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert 120 < np.median(pixels) < 135
    assert (decode_image(save(np.full((4, 4), 7, dtype), "TIFF"), LIMIT) == 0).all()
    if dtype == np.float32:
        deep[3, 3] = np.nan
        assert decode_image(save(deep, "TIFF"), LIMIT)[3, 3] == 0  # background


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    for kind in ("PNG", "JPEG"):
        assert decode_image(save(GRAY, kind, exif=exif), LIMIT).shape == (30, 40)
    assert np.array_equal(decode_image(save(GRAY, "TIFF", exif=exif), LIMIT), GRAY)


def test_the_client_reads_the_same_pixels(tmp_path: Any) -> None:
    """So that an image has one id, whoever decoded its file."""
    files = {
        "gray.png": save(GRAY),
        "la.png": save(Image.fromarray(GRAY).convert("LA")),
        "rgba.png": save(np.dstack([COLOR, GRAY])),
        "palette.png": save(Image.fromarray(COLOR).convert("P")),
        "deep.png": save(GRAY.astype(np.uint16) * 200),
        "float.tif": save(GRAY.astype(np.float32) / 7, "TIFF"),
        "photo.jpg": save(COLOR, "JPEG"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert image_digest(read_image(tmp_path / name)) == image_digest(decode_image(data, LIMIT)), name


def test_several_frames_are_refused_without_walking_through_them() -> None:
    stack = save(GRAY, "TIFF", save_all=True, append_images=[Image.fromarray(GRAY)] * 3)
    moving = save(GRAY, "PNG", save_all=True, append_images=[Image.fromarray(255 - GRAY)])
    for data in (stack, moving):
        with pytest.raises(InvalidImage, match="several frames; expected one"):
            decode_image(data, LIMIT)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "WEBP", "PPM", "PDF", "ICO", "TGA", "PCX"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(InvalidImage, match="the image is no PNG, JPEG or TIFF file: got"):
        decode_image(save(GRAY, kind), LIMIT)


@pytest.mark.parametrize(
    "size", [(1, LIMIT + 1), (400, 400), (10_000, 9_000), (16_000, 16_000), (2**31 - 1, 2**31 - 1)]
)
def test_a_huge_declared_size_costs_nothing(size: tuple[int, int], png_of_size: Any) -> None:
    data = png_of_size(*size)
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="pixels"):
            decode_image(data, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_huge_tiff_is_refused_by_its_header() -> None:
    data = bytearray(save(GRAY, "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(start + 2, start + 26, 12):  # width and height come first
        struct.pack_into("<HHII", data, entry, *struct.unpack_from("<HH", data, entry)[:1], 4, 1, 30_000)
    with pytest.raises(TooLarge):
        decode_image(bytes(data), LIMIT)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_compressed_bomb_beside_the_pixels_is_not_inflated(kind: bytes) -> None:
    packed = zlib.compress(bytes(200 << 20), 9)
    text = b"k\0\1\0\0\0" + packed if kind == b"iTXt" else b"k\0\0" + packed
    whole = save(GRAY)
    chunk = struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))
    data = whole[:33] + chunk + whole[33:]  # after the header chunk
    tracemalloc.start()
    started = time.monotonic()
    try:
        _read_or_refuse(data)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 2


def _read_or_refuse(data: bytes, decode: Callable[[bytes], Any] = lambda d: decode_image(d, LIMIT)) -> None:
    """Decode; a refusal must be one of ours and speak of no library, path or pointer."""
    message = ""
    try:
        decode(data)
    except VessaError as error:
        message = str(error)
    assert not [word for word in ("PIL", "Pillow", "0x", "/", "Error", "BytesIO") if word in message], message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_file_cut_anywhere_is_read_or_refused(kind: str) -> None:
    whole = save(COLOR, kind)
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        _read_or_refuse(whole[:length])
    with pytest.raises(InvalidImage, match="the image"):
        decode_image(whole[: len(whole) // 2], LIMIT)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["PNG", "JPEG", "TIFF"]), st.integers(0, 10_000), st.binary(min_size=1, max_size=30))
def test_damage_never_escapes_as_another_error(kind: str, position: int, noise: bytes) -> None:
    data = bytearray(save(GRAY[:12, :12], kind))
    position %= len(data)
    data[position : position + len(noise)] = noise
    _read_or_refuse(bytes(data))
    _read_or_refuse(bytes(data), lambda d: decode_mask(d, (12, 12), LIMIT))


# --- masks


def test_mask_values_are_the_class_ids_at_any_depth() -> None:
    assert np.array_equal(decode_mask(save(IDS), IDS.shape, LIMIT), IDS)
    assert np.array_equal(decode_mask(save(IDS.astype(np.uint16)), IDS.shape, LIMIT), IDS)
    palette = Image.fromarray(IDS).convert("P")
    palette.putdata(IDS.reshape(-1).tolist())
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    for bits in (2, 4, 8):
        assert np.array_equal(decode_mask(save(palette, bits=bits), IDS.shape, LIMIT), IDS)
    binary = Image.fromarray((IDS > 0).astype(np.uint8) * 255).convert("1")
    assert np.array_equal(decode_mask(save(binary), IDS.shape, LIMIT), IDS > 0)


@pytest.mark.parametrize("depth", [2, 4])
def test_gray_masks_of_few_bits_keep_their_ids(depth: int) -> None:
    rows = b"".join(b"\0" + bytes(_pack(row, depth)) for row in IDS)
    whole = save(GRAY)
    header = struct.pack(">IIBBBBB", 40, 30, depth, 0, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = whole[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decode_mask(data, IDS.shape, LIMIT), IDS)


def _pack(row: Any, depth: int) -> list[int]:
    per_byte = 8 // depth
    return [
        sum(int(v) << (8 - depth * (i + 1)) for i, v in enumerate(row[start : start + per_byte]))
        for start in range(0, len(row), per_byte)
    ]


@pytest.mark.parametrize(
    ("mask", "kind", "error", "message"),
    [
        (IDS[:-1], "PNG", ShapeMismatch, r"size \(height, width\) \(30, 40\), got \(29, 40\)"),
        (COLOR, "PNG", InvalidImage, "has color or transparency .RGB.; expected one channel"),
        (np.dstack([COLOR, GRAY]), "PNG", InvalidImage, "has color or transparency .RGBA."),
        (IDS.astype(np.uint16) * 200, "PNG", UnknownClass, r"the values \[400\], which are no class ids"),
        (IDS, "JPEG", InvalidImage, "the mask must be a PNG file"),
        (IDS, "TIFF", InvalidImage, "the mask must be a PNG file"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask: Any, kind: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        decode_mask(save(mask, kind), IDS.shape, LIMIT)


# --- pictures out, and the padding of a form's prompts


def test_labels_go_out_as_they_are() -> None:
    assert np.array_equal(decode_mask(label_png(IDS), IDS.shape, LIMIT), IDS)


def test_an_overlay_has_a_line_for_each_class() -> None:
    with_legend, without = (
        Image.open(io.BytesIO(overlay_png(COLOR, IDS, names))) for names in ({1: "a", 2: "Ö"}, {})
    )
    with with_legend, without:
        assert without.size == (520, 390)  # 13 times 40 x 30: the longer side has 512 or more
        assert with_legend.size == (520, 390 + 2 * 22 + 6)
        assert with_legend.getpixel((15, 390 + 14)) == class_color(1)


def test_one_long_row_of_points_does_not_make_all_classes_long() -> None:
    classes = {i: f"c{i}" for i in range(1, 255)}
    tracemalloc.start()
    try:
        with pytest.raises(VessaError, match="at most 64 points, got 20000"):
            read_per_class({"c7": [[1, 2]] * 20_000}, classes, "points", np.float32, (None, 2), 64)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # padded, they would take 40 MB
    finally:
        tracemalloc.stop()
