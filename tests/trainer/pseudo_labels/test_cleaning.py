"""Labels cleaned volume by volume: which classes lose islands, and when a label is available."""

import shutil

import numpy as np
import pytest
from PIL import Image

from vessa.datasets import open_dataset
from vessa_trainer.data.splits import read_splits, slices_of
from vessa_trainer.pseudo_labels.cache import FolderCache
from vessa_trainer.pseudo_labels.cleaning import VolumeCleaner
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.types import PseudoLabel


@pytest.fixture
def splits(dataset, tiny):
    return read_splits(dataset, tiny().data)


@pytest.fixture
def cleaner(dataset, splits):
    return VolumeCleaner(dataset, splits.labeled)


def label_of(*places, size=(16, 16)):
    labels = np.zeros(size, np.uint8)
    for rows, columns, class_id in places:
        labels[rows, columns] = class_id
    return PseudoLabel(labels, np.full(size, 230, np.uint8))


def test_islands_are_removed_and_the_box_spans_the_volume(cleaner, splits, dataset):
    names = cleaner.volume_of(slices_of(dataset, splits.unlabeled)[0].name)
    assert len(names) == 3
    assert 3 in cleaner.single  # the phantoms' left ventricle is one component
    body = (slice(4, 8), slice(4, 8), 3)
    labels = [label_of(body), label_of(body, (slice(13, 15), slice(13, 15), 3)), label_of(body)]
    cleaned = cleaner.clean(dict(zip(names, labels, strict=True)))
    assert list(cleaned) == list(names)
    assert all(one.box == (4, 4, 8, 8) for one in cleaned.values())
    middle = cleaned[names[1]]
    assert (middle.labels[13:15, 13:15] == 0).all()
    assert (middle.confidence[13:15, 13:15] == 0).all()  # nothing is known there
    assert cleaner.removed_share() == pytest.approx(4 / (3 * 16 + 4))


def test_slices_of_different_sizes_are_cleaned_one_by_one(cleaner, splits, dataset, caplog):
    names = cleaner.volume_of(slices_of(dataset, splits.unlabeled)[0].name)
    sizes = [(16, 16), (16, 16), (20, 16)]
    labels = [label_of((slice(2, 6), slice(2, 6 + i), 3), size=s) for i, s in enumerate(sizes)]
    cleaned = cleaner.clean(dict(zip(names, labels, strict=True)))
    assert [one.box for one in cleaned.values()] == [(2, 2, 6, 6), (2, 2, 7, 6), (2, 2, 8, 6)]
    assert "different sizes" in caplog.text


def test_a_label_is_available_once_its_volume_is(client, dataset, bank, tiny, tmp_path, cleaner, splits):
    names = [s.name for s in slices_of(dataset, splits.unlabeled)]
    cache = FolderCache(tmp_path / "labels")
    feed = AnnotationFeed(client, dataset, bank, cache, tiny().annotator, cleaner=cleaner)
    try:
        (one,) = feed.get(names[4:5])
        assert feed.stats()["images"] >= 3  # its whole volume was requested
        raw = AnnotationFeed(client, dataset, bank, cache, tiny().annotator)
        try:
            volume = cleaner.volume_of(names[4])
            expected = cleaner.clean(dict(zip(volume, raw.get(volume), strict=True)))[names[4]]
            assert raw.stats()["requests"] == 0  # the cache holds labels as they came
        finally:
            raw.close()
        assert np.array_equal(one.labels, expected.labels)
        assert np.array_equal(one.confidence, expected.confidence)
        assert one.box == expected.box
        assert 0 <= feed.stats()["removed_share"] < 1
    finally:
        feed.close()


def test_a_masks_second_component_keeps_a_class_from_losing_islands(phantoms, tmp_path, splits):
    folder = tmp_path / "two"
    shutil.copytree(phantoms, folder)
    dataset = open_dataset(folder)
    for item in slices_of(dataset, splits.labeled):
        mask = dataset.mask(item).copy()
        mask[0:5, 0:5] = 3
        Image.fromarray(mask).save(next((folder / "masks").glob(f"{item.name}.*")))
    assert 3 not in VolumeCleaner(open_dataset(folder), splits.labeled).single
