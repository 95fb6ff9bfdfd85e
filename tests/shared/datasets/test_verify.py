"""`verify` finds what would spoil training."""

import json

import numpy as np
import pytest
from PIL import Image

from vessa.datasets import open_dataset, verify


@pytest.fixture
def folder(tmp_path):
    """Write a clean data set of three groups with two images each."""
    rng = np.random.default_rng(1)
    for sub in ("images", "masks"):
        (tmp_path / sub).mkdir()
    for group in ("a", "b", "c"):
        for index in (1, 2):
            pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{group}_{index}.png")
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "masks" / f"{group}_{index}.png")
    (tmp_path / "meta.json").write_text(json.dumps({"classes": {"0": "background", "1": "disk"}}))
    return tmp_path


def found(folder, splits=None):
    return [(f.kind, f.where, f.severity) for f in verify(open_dataset(folder), splits)]


def write(path, array):
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def test_a_clean_data_set_has_no_findings(folder):
    assert found(folder, {"train": ("a", "b"), "test": ("c",)}) == []


def test_a_patient_in_two_splits_is_found(folder):
    splits = {"train": ("a", "b"), "val": ("c",), "test": ("b", "zz")}
    assert found(folder, splits) == [
        ("unknown_group", "test", "error"),
        ("split_overlap", "train, test", "error"),
    ]


def test_faulty_masks_are_found(folder):
    write(folder / "masks/a_1.png", np.zeros((8, 8)))
    write(folder / "masks/a_2.png", np.full((8, 8), 7))
    write(folder / "masks/b_1.png", np.eye(4))
    (folder / "masks/b_2.png").write_bytes(b"no PNG")
    assert found(folder) == [
        ("empty_mask", "a_1", "warning"),
        ("unknown_class", "a_2", "error"),
        ("size_mismatch", "b_1", "error"),
        ("unreadable", "b_2", "error"),
    ]


def test_the_same_pixels_in_two_groups_are_an_error_in_one_a_warning(folder):
    (folder / "images/b_1.png").write_bytes((folder / "images/a_1.png").read_bytes())
    (folder / "images/c_2.png").write_bytes((folder / "images/c_1.png").read_bytes())
    assert found(folder) == [
        ("duplicate_image", "a_1, b_1", "error"),
        ("duplicate_image", "c_1, c_2", "warning"),
    ]
    for name in ("a_1", "b_1", "c_1", "c_2"):
        write(folder / "images" / f"{name}.png", np.zeros((8, 8)))  # blank slices are all alike
    assert found(folder) == []


def test_a_class_that_no_mask_shows_is_found(folder):
    meta = {"classes": {"0": "background", "1": "disk", "2": "ring"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert found(folder) == [("absent_class", "ring", "warning")]


def test_a_data_set_without_masks_is_found(folder):
    for path in (folder / "masks").glob("*.png"):
        path.unlink()
    assert found(folder) == [("no_masks", folder.name, "warning")]
