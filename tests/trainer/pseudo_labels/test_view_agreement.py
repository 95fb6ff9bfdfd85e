"""Refined labels are taken where more views agree with them."""

import numpy as np
import pytest

from vessa.client import Prompts
from vessa_trainer.data.splits import read_splits, slices_of
from vessa_trainer.pseudo_labels.cache import FolderCache
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.types import PseudoLabel
from vessa_trainer.pseudo_labels.view_agreement import VIEWS, accept, back, seen


def label(ids, confidence):
    return PseudoLabel(np.array([ids], np.uint8), np.array([confidence], np.uint8))


def test_pixels_are_refined_where_more_views_agree():
    before, refined = label([1, 1, 0, 0], [200] * 4), label([1, 0, 1, 1], [90] * 4)
    views = [np.array([row], np.uint8) for row in ([1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 255])]
    found = accept(before, refined, views)
    assert found.labels.tolist() == [[1, 0, 1, 0]]
    assert found.confidence.tolist() == [[200, 90, 90, 200]]


@pytest.mark.parametrize(("angle", "scale"), [*VIEWS, (0.0, 1.0)])
@pytest.mark.parametrize("shape", [(60, 60), (40, 80)])
def test_labels_of_a_view_come_back_to_their_place(angle, scale, shape):
    mask = np.zeros(shape, np.uint8)
    mask[12:28, 22:40] = 200
    found = back(seen(mask, angle, scale), angle, scale)
    inside = found != 255
    assert inside[10:30, 20:42].all()
    differing = (found > 100) != (mask > 100)
    assert differing[inside].mean() < 0.04
    assert (found[15:25, 26:36] > 100).all()


def test_a_feed_keeps_what_no_view_supports(wired, wire, dataset, bank, tiny, tmp_path):
    items = slices_of(dataset, read_splits(dataset, tiny().data).unlabeled)[:2]
    names = [item.name for item in items]
    corner = np.full((3, 4), -1, np.float32)
    corner[0] = 0, 0, 6, 6  # a box where no structure lies
    cache = FolderCache(tmp_path / "labels")
    feed = AnnotationFeed(wired, dataset, bank, cache, tiny().annotator, exact=True, by_views=True)
    try:
        feed.prefetch(names)
        before = feed.get(names)
        feed.refresh(names, [Prompts(boxes=corner)] * 2)
        after = feed.get(names, newest=True)
        for one, other in zip(before, after, strict=True):
            # the plain label votes for itself: what no view sees stays as it was
            changed = one.labels != other.labels
            assert changed.mean() < 0.2
        assert sum(len(ids) for ids in wire.asked) == 2 * (1 + 1 + len(VIEWS))
        assert 0 <= feed.stats().get("refined_share", 0) <= 1
    finally:
        feed.close()
