"""Metrics by hand and against a plain restatement on random volumes."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from vessa.metrics import dice, hd95, iou, iou_fgbg, score_volumes, surface_distances


def test_overlap_by_hand():
    one, other = np.zeros((1, 2, 4), bool), np.zeros((1, 2, 4), bool)
    one[0, 0, :2] = True
    other[0, 0, 1:3] = True
    assert dice(one, other) == pytest.approx(0.5)
    assert iou(one, other) == pytest.approx(1 / 3)
    assert iou_fgbg(one, other) == pytest.approx((1 / 3 + 5 / 7) / 2)
    everything = np.ones((1, 2, 2), bool)
    assert iou_fgbg(everything, everything) == 1


def test_empty_masks_never_look_perfect():
    nothing, something = np.zeros((2, 3, 6), bool), np.zeros((2, 3, 6), bool)
    something[0, 0, 0] = True
    for metric in (dice, iou, iou_fgbg, hd95):
        assert metric(nothing, nothing) is None
    assert dice(nothing, something) == iou(something, nothing) == 0
    assert hd95(nothing, something) == pytest.approx(7)
    assert hd95(something, nothing, (2.0, 1.0, 1.0)) == pytest.approx(np.sqrt(16 + 9 + 36))


def _reference_hd95(pred, truth, spacing):
    """All pairs of surface voxels, by brute force."""
    surfaces = [np.argwhere(m & ~ndimage.binary_erosion(m)) * np.array(spacing) for m in (pred, truth)]
    distance = cdist(*surfaces)
    return np.percentile(np.concatenate([distance.min(1), distance.min(0)]), 95)


@pytest.mark.parametrize("seed", range(6))
def test_hd95_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((2, 7, 16, 18)), (0, 1, 2, 2))
    pred, truth = fields > np.quantile(fields, 0.8)
    spacing = (3.0, 1.5, 1.2)
    assert hd95(pred, truth, spacing) == pytest.approx(_reference_hd95(pred, truth, spacing))
    assert hd95(pred, pred) == 0


def test_a_lone_slice_is_measured_in_its_plane():
    pred, truth = np.zeros((1, 20, 20), bool), np.zeros((1, 20, 20), bool)
    pred[0, 5:15, 5:15] = True
    truth[0, 5:15, 5:12] = True
    assert hd95(pred, truth) == pytest.approx(_reference_hd95(pred[0], truth[0], (1.0, 1.0)))
    assert hd95(pred, truth, (9.0, 2.0, 2.0)) == pytest.approx(2 * hd95(pred, truth))


def test_volumes_are_scored_by_class_and_counted():
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[0, :2, :2] = 1
    perfect, empty = truth.copy(), np.zeros_like(truth)
    other = np.zeros_like(truth)
    other[0, 3, 3] = 2
    scores = score_volumes(
        [(perfect, truth, None), (empty, truth, None), (other, empty, None)], {1: "a", 2: "b"}
    )
    assert scores.by_class["a"]["dice"] == pytest.approx(0.5)
    assert scores.by_class["b"]["dice"] == 0
    assert scores.mean["dice"] == pytest.approx(0.25)
    assert scores.unit == "voxel"
    assert scores.counts["a"] == {"scored": 2, "both_empty": 1, "pred_empty": 1, "truth_empty": 0}
    assert scores.counts["b"] == {"scored": 1, "both_empty": 2, "pred_empty": 0, "truth_empty": 1}
    assert scores.to_dict()["unit"] == "voxel"


def test_millimeters_need_every_spacing():
    volume = np.ones((2, 2, 2), np.uint8)
    spacing = (1.0, 1.0, 1.0)
    assert score_volumes([(volume, volume, spacing)], {1: "a"}).unit == "mm"
    assert score_volumes([(volume, volume, spacing), (volume, volume, None)], {1: "a"}).unit == "voxel"
    assert score_volumes([], {1: "a"}).mean["dice"] is None


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="volume 0: prediction has shape"):
        score_volumes([(np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 3), np.uint8), None)], {1: "a"})


def test_surface_distances_by_hand():
    one, other = np.zeros((3, 3, 9), bool), np.zeros((3, 3, 9), bool)
    one[1, 1, 1] = True
    other[1, 1, 4:6] = True
    to_other, to_one = surface_distances(one, other, (5.0, 5.0, 2.0))
    assert to_other.tolist() == [6]
    assert sorted(to_one.tolist()) == [6, 8]


def test_a_mask_at_the_volumes_edge_has_its_surface_there():
    whole = np.ones((4, 4, 4), bool)
    to_other, _ = surface_distances(whole, whole)
    assert to_other.size == 4**3 - 2**3


@pytest.mark.parametrize("metric", [dice, iou, iou_fgbg, hd95, surface_distances])
def test_what_is_not_bool_of_one_shape_is_refused(metric):
    mask = np.ones((2, 3, 3), bool)
    with pytest.raises(ValueError, match="two bool arrays of one shape, got uint8"):
        metric(mask.astype(np.uint8), mask)
    with pytest.raises(ValueError, match="two bool arrays of one shape"):
        metric(mask, mask[:1])


def test_a_distance_needs_volumes_a_spacing_and_a_surface():
    mask = np.ones((2, 3, 3), bool)
    for volume, spacing in (
        (mask[0], None),
        (mask, (1.0, 1.0)),
        (mask, (1.0, 0.0, 1.0)),
        (mask, (np.nan,) * 3),
    ):
        with pytest.raises(ValueError, match="a positive spacing"):
            hd95(volume, volume, spacing)
    with pytest.raises(ValueError, match="no surface"):
        surface_distances(mask, ~mask)
