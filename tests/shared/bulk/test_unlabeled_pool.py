"""Find unlabeled images in data sets and in folders of images and volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scans import dicom_series, nifti, phantom, written

from vessa.bulk.unlabeled_pool import Pixels, find_candidates
from vessa.errors import InvalidDataset
from vessa.volumes import read_volume


def save(path: Path, array: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def gray(value: int) -> Any:
    return np.full((4, 5), value, np.uint8)


@pytest.fixture
def find() -> Any:
    """Return the candidates of a folder and the names of skipped files."""

    def call(folder: Path, **options: Any) -> tuple[list[Any], list[str]]:
        skipped: list[str] = []
        found = list(find_candidates(folder, skip=lambda name, error: skipped.append(name), **options))
        return found, skipped

    return call


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """p1 is annotated, p2 in one of two slices, p3 not at all."""
    for number, name in enumerate(("p1_0", "p2_0", "p2_1", "p3_0")):
        save(tmp_path / "images" / f"{name}.png", gray(number))
    for name in ("p1_0", "p2_0"):
        save(tmp_path / "masks" / f"{name}.png", gray(1))
    (tmp_path / "meta.json").write_text('{"classes": {"1": "disk"}}')
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_text("p1\np3\n")
    return tmp_path


def test_a_data_set_yields_its_slices_without_a_mask(find: Any, dataset: Path) -> None:
    found, skipped = find(dataset)
    assert [(one.name, one.group) for one in found] == [("p2_1", "p2"), ("p3_0", "p3")]
    assert skipped == []
    pixels = Pixels(found)
    assert len(pixels) == 2
    assert [int(image.max()) for image in pixels] == [2, 3]
    assert int(pixels[1:][0].max()) == 3
    assert [one.group for one in find(dataset, split="train")[0]] == ["p3"]


def test_an_unreadable_mask_skips_only_its_image(find: Any, dataset: Path) -> None:
    (dataset / "masks" / "p2_0.png").write_bytes(b"\x89PNG")
    found, skipped = find(dataset)
    assert [one.name for one in found] == ["p2_1", "p3_0"]
    assert skipped == ["p2_0"]


def test_a_folder_with_an_invalid_group_name_is_named_by_its_digest(find: Any, tmp_path: Path) -> None:
    for folder in ("", "x" * 129, "p1 ", "p2"):
        save(tmp_path / folder / "one.png", gray(1))
    groups = [one.group for one in find(tmp_path, by_folder=True)[0]]
    assert set(map(len, filter(None, groups))) == {2, 64}
    assert {"p2", None} < set(groups)
    assert len(set(groups)) == 4


def test_another_folder_yields_all_images_below_it(find: Any, tmp_path: Path) -> None:
    save(tmp_path / "b" / "two.tif", gray(2))
    save(tmp_path / "a" / "one.PNG", gray(1))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a" / "broken.png").write_bytes(b"\x89PNG")
    found, skipped = find(tmp_path)
    assert [(one.name, one.group) for one in found] == [("a/one.PNG", None), ("b/two.tif", None)]
    assert skipped == ["a/broken.png"]
    assert [one.group for one in find(tmp_path, by_folder=True)[0]] == ["a", "b"]


def test_slices_are_grouped_by_file_or_series_folder(find: Any, tmp_path: Path) -> None:
    (tmp_path / "heart.nii").write_bytes(nifti(phantom(), np.diag([1.0, 2.0, 5.0, 1.0])))
    (tmp_path / "cut.nii").write_bytes(nifti(phantom(), np.eye(4))[:500])
    (tmp_path / "ct").mkdir()
    for number, file in enumerate(dicom_series(phantom())):
        (tmp_path / "ct" / f"{number}").write_bytes(written(file))
    found, skipped = find(tmp_path)
    assert [(one.name, one.group) for one in found] == [
        *((f"ct:{i}", "ct") for i in range(6)),
        *((f"heart.nii:{i}", "heart.nii") for i in range(6)),
    ]
    assert skipped == ["cut.nii"]
    volume = read_volume(tmp_path / "heart.nii")
    assert np.array_equal(found[-1].read(), volume.image(2, 5))


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("none", {}, "none does not exist"),
        ("plain", {"split": "train"}, "has no splits"),
        (".", {"by_folder": True}, "with patient names"),
        (".", {"split": "test"}, "No split file"),
    ],
)
def test_options_that_do_not_fit_the_folder_are_refused(
    find: Any, dataset: Path, folder: str, options: Any, message: str
) -> None:
    (dataset / "plain").mkdir()
    with pytest.raises(InvalidDataset, match=message):
        find(dataset / folder, **options)
