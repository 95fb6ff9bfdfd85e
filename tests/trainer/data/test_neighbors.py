"""2.5D: neighboring slices as channels, in training and at prediction alike."""

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from vessa.errors import InvalidConfig, InvalidDataset
from vessa_trainer.config import ViewsConfig, load_config
from vessa_trainer.data import augmentation
from vessa_trainer.data.neighbors import SliceStacks, with_neighbors
from vessa_trainer.data.prepared import PreparedSlices
from vessa_trainer.experiments.run import fit
from vessa_trainer.prediction.delivery import open_run
from vessa_trainer.prediction.predict import predict


def gray(value, size=(4, 5)):
    return np.full(size, value, np.uint8)


def test_neighbors_lie_below_and_above_and_the_last_is_repeated():
    stacks = with_neighbors([gray(10), gray(20), gray(30)], 2)
    assert [stack[0, 0].tolist() for stack in stacks] == [
        [10, 10, 10, 20, 30],
        [10, 10, 20, 30, 30],
        [10, 20, 30, 30, 30],
    ]
    assert with_neighbors([gray(10)], 0)[0].shape == (4, 5)


def test_a_neighbor_of_another_size_is_not_stacked():
    stacks = with_neighbors([gray(10), gray(20, (6, 5)), gray(30)], 1)
    assert [stack[0, 0].tolist() for stack in stacks] == [[10, 10, 10], [20, 20, 20], [30, 30, 30]]


def test_color_images_are_refused():
    with pytest.raises(InvalidDataset, match="color image; neighboring slices .* Set student.neighbors=0"):
        with_neighbors([np.zeros((4, 5, 3), np.uint8)], 1)


def test_prepared_squares_show_what_prediction_shows(dataset):
    case = dataset.cases()[0]
    stacks = with_neighbors([dataset.image(s) for s in case.slices], 1)
    reader = SliceStacks(dataset, 1)
    prepared = PreparedSlices(dataset, case.slices, 32, need_masks=True, neighbors=1)
    for item, stack, square in zip(case.slices, stacks, prepared.images, strict=True):
        assert np.array_equal(reader.image(item), stack)
        assert np.array_equal(square.permute(1, 2, 0).numpy(), stack)


def test_strong_views_change_all_slices_alike():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[:, 1] = images[:, 0]
    config = ViewsConfig(jitter_p=1.0, blur_p=0.0, noise_p=0.0)
    found = augmentation.strong_view(images, config, [1, 2], color=False)
    assert torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(found, augmentation.strong_view(images, config, [1, 2]))


def test_a_pretrained_encoder_takes_one_neighbor():
    load_config(None, ["student.encoder=tf_efficientnet_lite0", "student.neighbors=1"])
    with pytest.raises(InvalidConfig, match="student.neighbors must be 0 or 1, got 2"):
        load_config(None, ["student.encoder=tf_efficientnet_lite0", "student.neighbors=2"])


def test_a_run_with_neighbors_predicts_pictures_of_a_case_together(tiny, dataset, tmp_path, caplog):
    fit(tiny("student.neighbors=1", "semi.method=supervised", steps=2), resume_line="again")
    run, options = tmp_path / "run", {"flips": False, "axis": "auto", "nifti": False}
    assert open_run(run).members[0].channels == 3
    predict(run, dataset.root, tmp_path / "set", Console(quiet=True), **options)
    case = dataset.cases()[2]
    expected = open_run(run).labels([dataset.image(s) for s in case.slices], flips=False)
    expected = open_run(run).postprocessing.apply(expected)
    for item, one in zip(case.slices, expected, strict=True):
        with Image.open(tmp_path / "set" / f"{item.name}.png") as mask:
            assert np.array_equal(np.array(mask), one)
    assert "one by one" not in caplog.text
    predict(run, dataset.root / "images", tmp_path / "plain", Console(quiet=True), **options)
    assert "pictures outside of a data set are predicted one by one" in caplog.text
