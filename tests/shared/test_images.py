"""Reading a user's image: always uint8, never a guess; and the overlay."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vessa.errors import InvalidImage, TooLarge
from vessa.images import read_image
from vessa.intensities import to_bytes
from vessa.masks.colors import OPACITY, class_color
from vessa.masks.overlay import overlay

GRAY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOR = np.stack([GRAY, GRAY // 2, 255 - GRAY], axis=-1)


def save(path, array, mode=None, **options):
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_gray_and_color_come_back_as_they_are(tmp_path, suffix):
    assert np.array_equal(read_image(save(tmp_path / f"g.{suffix}", GRAY)), GRAY)
    assert np.array_equal(read_image(save(tmp_path / f"c.{suffix}", COLOR)), COLOR)
    assert read_image(save(tmp_path / "j.jpg", COLOR)).shape == (6, 8, 3)


def test_transparency_is_dropped_and_palettes_become_colors(tmp_path):
    alpha = np.dstack([COLOR, np.full((6, 8), 7, np.uint8)])
    assert np.array_equal(read_image(save(tmp_path / "rgba.png", alpha)), COLOR)
    assert np.array_equal(read_image(save(tmp_path / "la.png", GRAY, "LA")), GRAY)
    assert read_image(save(tmp_path / "p.png", COLOR, "P")).shape == (6, 8, 3)
    bits = read_image(save(tmp_path / "bits.png", GRAY, "1"))
    assert bits.shape == (6, 8)
    assert set(np.unique(bits)) <= {0, 255}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_images_are_scaled_by_their_percentiles(tmp_path, dtype):
    deep = np.linspace(100, 40000, 2000).reshape(40, 50).astype(dtype)
    deep[0, 0] = 65000  # an outlier must not darken the rest
    pixels = read_image(save(tmp_path / "deep.tif", deep))
    assert pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert 120 < np.median(pixels) < 135


def test_few_bright_pixels_do_not_vanish():
    lonely = np.zeros((40, 50), np.uint16)
    lonely[3, 4] = 9000
    assert to_bytes(lonely)[3, 4] == 255
    assert to_bytes(lonely).sum() == 255
    assert (to_bytes(np.full((4, 4), 7.5)) == 0).all()


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    for value in (np.nan, np.inf):
        path = save(tmp_path / "f.tif", np.full((4, 4), value, np.float32))
        with pytest.raises(InvalidImage, match="no pixel that is a finite number"):
            read_image(path)


def test_several_frames_are_refused_and_not_read_in_part(tmp_path):
    path = tmp_path / "stack.tif"
    Image.fromarray(GRAY).save(path, save_all=True, append_images=[Image.fromarray(GRAY)])
    with pytest.raises(InvalidImage, match="several frames; expected one"):
        read_image(path)


def test_exif_rotation_is_not_applied_and_said(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(GRAY)
    picture.save(tmp_path / "r.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "r.png"), GRAY)
    picture.save(tmp_path / "r.tif", exif=exif)
    assert np.array_equal(read_image(tmp_path / "r.tif"), GRAY)
    for name in ("r.png", "r.tif"):
        assert f"{name}: the orientation tag (6) is not applied" in caplog.text
    caplog.clear()
    exif[0x0112] = 1
    picture.save(tmp_path / "upright.jpg", exif=exif)
    picture.save(tmp_path / "broken.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(tmp_path / "upright.jpg").shape == read_image(tmp_path / "broken.png").shape
    assert caplog.text == ""


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    cut = save(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8))
    cut.write_bytes(cut.read_bytes()[:500])
    save(tmp_path / "other.bmp", GRAY)
    for name, why in {
        "text.png": "text.png is no PNG, JPEG or TIFF file",
        "cut.png": "cut.png is damaged or cut off: its PNG data cannot be decoded",
        "other.bmp": "got a BMP file",
        "": "cannot be read",
    }.items():
        with pytest.raises(InvalidImage, match=why):
            read_image(tmp_path / name)
    with pytest.raises(InvalidImage, match="no such file"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(9000, 9000), (11000, 10000), (60000, 60000)])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, size, png_of_size):
    (tmp_path / "huge.png").write_bytes(png_of_size(*size))
    with pytest.raises(TooLarge, match="more than (the limit of )?67108864"):
        read_image(tmp_path / "huge.png")


def test_an_overlay_colors_classes_and_leaves_the_rest():
    labels = np.zeros((6, 8), np.uint8)
    labels[1:5, 1:6] = 2
    picture = overlay(GRAY, labels)
    assert picture.shape == (6, 8, 3)
    assert np.array_equal(picture[labels == 0], np.repeat(GRAY[labels == 0][:, None], 3, 1))
    assert np.array_equal(picture[1, 1], class_color(2))  # contour
    inner = GRAY[2, 3] * (1 - OPACITY) + np.array(class_color(2)) * OPACITY
    assert np.abs(picture[2, 3] - inner).max() <= 1
    assert np.array_equal(overlay(COLOR, labels)[0], COLOR[0])
    assert len({class_color(i) for i in range(1, 29)}) == 28


def test_a_wide_contour_lies_inside_its_class():
    labels = np.zeros((12, 12), np.uint8)
    labels[2:10, 2:10] = 1
    picture = overlay(np.zeros((12, 12), np.uint8), labels, contour=2)
    full = (picture == class_color(1)).all(-1)
    assert full.sum() == 8 * 8 - 4 * 4
    assert not full[labels == 0].any()
