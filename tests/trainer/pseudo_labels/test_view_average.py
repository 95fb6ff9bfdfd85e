"""Labels averaged over views: geometry, votes, confidence, requests."""

import numpy as np
import pytest

from vessa.client import Prompts
from vessa_trainer.data.splits import read_splits, slices_of
from vessa_trainer.pseudo_labels.cache import FolderCache
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.types import PseudoLabel
from vessa_trainer.pseudo_labels.view_average import VIEWS, average, back, label_by_views, seen


def label(ids, confidence):
    return PseudoLabel(np.array([ids], np.uint8), np.array([confidence], np.uint8))


def test_the_mean_of_the_votes_wins_and_disagreement_lowers_the_confidence():
    """By hand for one class: three votes of 0.8; one of 0.8 and two of 0.2; one view that sees the pixel."""
    views = [label([1, 1, 1, 0], [204, 204, 204, 0]), label([1, 0, 0, 0], [204, 204, 0, 0])]
    views.append(label([1, 0, 9, 0], [204, 204, 0, 0]))
    found = average(views, [0, 1])
    assert found.labels.tolist() == [[1, 0, 1, 0]]
    # shares of 0.8 and 0.2, and of 0.6 and 0.4, each to the power of 2 / 3
    sure = [0.862 / (0.862 + 0.342), 0.711 / (0.711 + 0.543), 0.862 / (0.862 + 0.342)]
    assert found.confidence[0, :3] / 255 == pytest.approx(sure, abs=0.003)
    assert found.confidence[0, 3] == 0  # no view knows this pixel
    nothing = label([0], [0])
    assert average([nothing, nothing], [0, 1]).confidence.tolist() == [[0]]


@pytest.mark.parametrize(("angle", "scale"), [*VIEWS, (0.0, 1.0)])
@pytest.mark.parametrize("shape", [(60, 60), (40, 80)])
def test_labels_of_a_view_come_back_to_their_place(angle, scale, shape):
    mask = np.zeros(shape, np.uint8)
    mask[12:28, 22:40] = 200
    view = seen(mask, angle, scale)
    found = back(PseudoLabel((view > 100).astype(np.uint8), np.full(shape, 90, np.uint8)), angle, scale)
    inside = found.confidence > 0
    assert set(np.unique(found.confidence)) <= {0, 90}
    assert inside[10:30, 20:42].all()
    differing = (found.labels == 1) != (mask > 100)
    assert differing[inside].mean() < 0.04
    assert (found.labels[15:25, 26:36] == 1).all()


def test_a_feed_averages_views_and_prompts_are_one_vote_of_five(wired, wire, dataset, bank, tiny, tmp_path):
    items = slices_of(dataset, read_splits(dataset, tiny().data).unlabeled)[:2]
    names = [item.name for item in items]
    corner = np.full((3, 4), -1, np.float32)
    corner[0] = 0, 0, 6, 6  # a box where no structure lies
    cache = FolderCache(tmp_path / "labels")
    feed = AnnotationFeed(wired, dataset, bank, cache, tiny("annotator.views=true").annotator, exact=True)
    plain = AnnotationFeed(wired, dataset, bank, cache, tiny().annotator)
    try:
        before = feed.get(names)
        assert sum(len(ids) for ids in wire.asked) == 2 * (1 + len(VIEWS))
        assert feed.stats()["images"] == 2 * (1 + len(VIEWS))
        alone = plain.get(names)  # from the cache: views are kept as they came
        assert plain.stats()["requests"] == 0
        assert any((a.confidence != b.confidence).any() for a, b in zip(alone, before, strict=True))

        def request(images):
            answers = wired.segment(list(images), bank=bank.name, groups=[item.group for item in items])
            return [PseudoLabel(one.labels, one.confidence) for one in answers]

        images = [dataset.image(item) for item in items]
        for ours, feeds in zip(label_by_views(images, [0, *feed.class_ids], request), before, strict=True):
            assert np.array_equal(ours.labels, feeds.labels)
            assert np.array_equal(ours.confidence, feeds.confidence)
        asked = sum(len(ids) for ids in wire.asked)
        feed.refresh(names, [Prompts(boxes=corner)] * 2)
        feed.get(names, newest=True)
        assert sum(len(ids) for ids in wire.asked) == asked + 2  # the plain images alone
    finally:
        feed.close()
        plain.close()
