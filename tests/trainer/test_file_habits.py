"""Test that harmless habits of files change nothing."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from vessa_trainer.data.verification import verify_data


def with_bom(folder):
    path = folder / "meta.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def with_apple_files(folder):
    for path in list((folder / "images").iterdir()):
        (folder / "images" / f"._{path.name}").write_bytes(bytes.fromhex("0005160700020000") + bytes(100))


def with_upper_suffixes(folder):
    for path in list((folder / "images").iterdir()):
        path.rename(path.with_suffix(".PNG"))


def with_one_bit(folder):
    for path in (folder / "masks").iterdir():
        with Image.open(path) as image:
            foreground = np.array(image) > 0
        Image.fromarray(foreground).save(path)
    (folder / "meta.json").write_text('{"classes": {"0": "background", "1": "heart"}}')


def with_another_unicode_form(folder):
    for part in ("images", "masks"):
        for path in list((folder / part).glob("heart000*")):
            path.rename(
                path.with_name(unicodedata.normalize("NFD", "Müller") + path.name.removeprefix("heart000"))
            )
    for path in (folder / "splits").iterdir():
        path.write_text(path.read_text().replace("heart000", "Müller"))


@pytest.mark.parametrize(
    "change", [with_bom, with_apple_files, with_upper_suffixes, with_one_bit, with_another_unicode_form]
)
def test_harmless_habits_of_files_are_read(hearts, change):
    change(hearts)
    found = verify_data(hearts, [])
    assert (found.images, found.errors) == (18, 0), found.findings
