"""Squares in files: the same as in memory, prepared once, mended when damaged, bounded."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vessa.datasets import open_dataset
from vessa.errors import InvalidConfig
from vessa_trainer.data.prepared import PreparedSlices
from vessa_trainer.semi_supervised.trainer import Run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prepared"


@pytest.fixture
def prepare(dataset, folder):
    def make(dataset=dataset, size=40, **options):
        return PreparedSlices(
            dataset, dataset.slices(), size, need_masks=True, **({"folder": folder} | options)
        )

    return make


def same(one, other):
    parts = ("images", "masks", "valid")
    return all(torch.equal(getattr(one, p), getattr(other, p)) for p in parts) and one.frames == other.frames


def test_squares_are_closed_to_others(prepare, folder):
    prepare()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_dir()} == {0o700}


def test_squares_in_files_are_those_in_memory(prepare):
    mapped, plain = prepare(), prepare(folder=None)
    assert same(mapped, plain)
    assert torch.equal(mapped.floats([0, 5, 3]), plain.floats([0, 5, 3]))
    assert isinstance(mapped._mapped.images, np.memmap)


def test_squares_are_prepared_once_for_all_runs(prepare, dataset, monkeypatch):
    prepare()

    def never(_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(dataset, "image", never)
    assert same(prepare(), prepare())
    with pytest.raises(AssertionError, match="decoded again"):
        prepare(size=48)


def test_gray_and_color_images_may_be_mixed(phantoms, tmp_path, prepare):
    shutil.copytree(phantoms, tmp_path / "mixed")
    dataset = open_dataset(tmp_path / "mixed")
    for item in dataset.slices()[2::3]:
        path = tmp_path / "mixed" / "images" / f"{item.name}.png"
        with Image.open(path) as image:
            color = image.convert("RGB")
        color.save(path)
    mapped = prepare(dataset)
    assert mapped.channels == 3
    assert same(mapped, prepare(dataset, folder=None))
    mapped.floats(range(len(mapped)))  # all rows pass their check


def test_a_changed_image_is_another_set(phantoms, tmp_path, prepare, folder):
    shutil.copytree(phantoms, tmp_path / "changed")
    dataset = open_dataset(tmp_path / "changed")
    prepare(dataset)
    path = tmp_path / "changed" / "images" / f"{dataset.slices()[0].name}.png"
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(path)
    assert (prepare(open_dataset(tmp_path / "changed")).images[0].max()) == 7
    assert len(list(folder.glob("[!.]*"))) == 2


def test_a_damaged_row_is_prepared_again(prepare, folder):
    prepare()
    (place,) = folder.glob("[!.]*")
    raw = np.load(place / "images.npy", mmap_mode="r+")
    raw[4] ^= 255
    raw.flush()
    plain = prepare(folder=None)
    damaged = prepare()
    assert not torch.equal(damaged.images[4], plain.images[4])
    assert torch.equal(damaged.floats([3, 4]), plain.floats([3, 4]))
    assert same(prepare(), plain)  # also on disk


@pytest.mark.parametrize("name", ["images.npy", "sums.npy", "sizes.npy"])
def test_a_damaged_file_is_built_anew(prepare, folder, name):
    prepare()
    (place,) = folder.glob("[!.]*")
    (place / name).write_bytes((place / name).read_bytes()[:100])
    assert same(prepare(), prepare(folder=None))


def test_the_folder_is_bounded(prepare, folder):
    prepare(size=40)
    first = {p.name for p in folder.glob("[!.]*")}
    prepare(size=48, limit_bytes=1)
    assert len(list(folder.glob("[!.]*"))) == 1
    assert not first & {p.name for p in folder.glob("[!.]*")}


def test_a_folder_that_cannot_be_made_is_refused(prepare, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match=r"data.prepared .* cannot hold the images"):
        prepare(folder=tmp_path / "file" / "below")


def test_a_run_learns_the_same_from_files(tiny, dataset, tmp_path, folder):
    figures = []
    for name, keys in (("memory", []), ("files", [f"data.prepared={folder}"])):
        run = Run(tiny(f"out={tmp_path / name}", *keys), dataset, None, "")
        figures.append({k: v for k, v in run._step().items() if k != "wait_seconds"})
    assert figures[0] == figures[1]


def test_squares_and_runs_among_the_images_are_no_other_images(phantoms, tmp_path, prepare, monkeypatch):
    shutil.copytree(phantoms, tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    places = {"folder": tmp_path / "data" / "prepared", "out": tmp_path / "data" / "run"}
    prepare(dataset, **places)
    places["out"].mkdir()
    (places["out"] / "metrics.jsonl").write_text("{}")
    monkeypatch.setattr(dataset, "image", lambda _: pytest.fail("decoded again"))
    prepare(dataset, **places)


def test_what_a_kill_left_half_built_is_deleted_a_day_later(prepare, folder):
    for name, age in ((".old.0123", 90_000), (".new.0123", 60)):
        (folder / name).mkdir(parents=True)
        (folder / name / "images.npy").write_bytes(b"half")
        os.utime(folder / name / "images.npy", (time.time() - age,) * 2)
    prepare()
    assert {p.name for p in folder.glob(".*") if p.is_dir()} == {".new.0123"}
