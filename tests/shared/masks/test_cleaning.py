"""Cleaning a volume's labels: smoothing along z, largest components, what is left alone."""

import numpy as np
import pytest

from vessa.datasets.base import IGNORE
from vessa.masks.cleaning import clean_volume, single_component_classes, stack_slices, structure_box


def volume(depth=3, side=8):
    return np.zeros((depth, side, side), np.uint8)


def sure(labels, value=230):
    return np.full(labels.shape, value, np.uint8)


def test_the_largest_component_of_a_class_is_kept_in_3d():
    labels = volume()
    labels[:, 1:3, 1:3] = 1  # 12 voxels over three slices
    labels[1, 5:8, 5:8] = 1  # 9 voxels in one slice, more than the other has there
    cleaned = clean_volume(labels, sure(labels), single=[1], neighbor_weight=0)
    assert cleaned.labels[:, 1:3, 1:3].all()
    assert cleaned.labels.sum() == 12
    assert cleaned.removed == {1: 9}
    assert (cleaned.confidence[1, 5:8, 5:8] == 0).all()  # removed voxels say nothing, not "background"
    assert (cleaned.confidence[0] == 230).all()
    assert cleaned.box == (1, 1, 3, 3)
    assert labels[1, 6, 6] == 1  # the input is left as it was


def test_classes_with_several_components_keep_theirs():
    labels = volume()
    labels[:, 1:3, 1:3] = 1
    labels[:, 5:7, 5:7] = 1
    cleaned = clean_volume(labels, sure(labels), single=[], neighbor_weight=0)
    assert np.array_equal(cleaned.labels, labels)
    assert cleaned.removed == {}


def test_classes_of_one_component_are_found_in_the_templates():
    one, two = volume(), volume()
    one[:, 1:6, 1:6] = 1
    one[0, 7, 7] = 1  # 1 voxel of 76: a slip of the pencil
    one[:, 0, 0] = 2
    two[:, 1:3, 1:3] = 3
    two[:, 5:7, 5:7] = 3
    two[1, 4, 0] = 2
    two[2, 0, 7] = IGNORE
    assert single_component_classes([one, two]) == (1, 2)
    assert single_component_classes([]) == ()


def test_a_slice_that_differs_from_both_neighbors_is_outvoted_where_it_is_unsure():
    labels = volume()
    labels[0] = labels[2] = 1
    confidence = sure(labels, 255)
    confidence[1] = 140  # the middle slice says background with 0.55
    cleaned = clean_volume(labels, confidence, single=[1], neighbor_weight=0.15)
    # votes for class 1 in the middle: 0.15 + 0.15 + 0.7 * 0.45 = 0.615
    assert (cleaned.labels == 1).all()
    assert cleaned.confidence[1, 0, 0] == pytest.approx(255 * (0.3 + 0.7 * (1 - 140 / 255)), abs=1)
    confidence[1] = 240
    assert (clean_volume(labels, confidence, single=[1]).labels[1] == 0).all()


def test_voxels_without_a_label_stay_without_one_and_do_not_vote():
    labels = volume()
    labels[0] = labels[2] = 1
    confidence = sure(labels)
    confidence[1] = 0
    cleaned = clean_volume(labels, confidence, single=[])
    assert (cleaned.confidence[1] == 0).all()
    assert (cleaned.labels[1] == 0).all()
    assert (cleaned.labels[0] == 1).all()
    assert (cleaned.confidence[0] == 230).all()


def test_an_empty_volume_and_a_single_slice_pass():
    labels = volume()
    cleaned = clean_volume(labels, sure(labels), single=[1, 2])
    assert cleaned.box is None
    assert not cleaned.labels.any()
    lone = volume(depth=1)
    lone[0, 2:4, 2:4] = 2
    assert np.array_equal(clean_volume(lone, sure(lone), single=[2]).labels, lone)


@pytest.mark.parametrize(
    ("shape", "weight", "message"),
    [
        ((8, 8), 0.1, r"expected labels and confidence of one shape \(D, H, W\)"),
        ((2, 8, 8), 0.5, "neighbor_weight"),
    ],
)
def test_bad_input_is_refused(shape, weight, message):
    labels = np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match=message):
        clean_volume(labels, labels, single=[], neighbor_weight=weight)


def test_slices_of_different_sizes_are_no_volume():
    small, large = np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)
    assert stack_slices([small, large]) is None
    assert stack_slices([small, small]).shape == (2, 4, 4)


def test_the_box_of_structures_leaves_out_specks_and_keeps_both_kidneys():
    labels = volume(side=16)
    labels[:, 2:6, 1:5] = 1
    labels[:, 2:5, 10:13] = 1  # more than a fifth of the other: a second organ
    labels[0, 14, 15] = 1
    assert structure_box(labels) == (1, 2, 13, 6)
    assert structure_box(labels * 0) is None
