"""The exchange of labels in the background: order, refreshing, an annotator that is away."""

import logging
import shutil
import threading
import time

import httpx
import numpy as np
import pytest

from vessa.client import Prompts
from vessa.codec import image_digest
from vessa.datasets import open_dataset
from vessa.errors import Unauthorized, Unreachable
from vessa_trainer.data.splits import read_splits, slices_of
from vessa_trainer.pseudo_labels import prefetcher
from vessa_trainer.pseudo_labels.cache import FolderCache
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed


def prompts_of(corner):
    """A box and mask logits for the first class alone."""
    boxes = np.full((3, 4), -1, np.float32)
    boxes[0] = corner, corner, corner + 8, corner + 8
    logits = np.full((3, 16, 16), -6, np.float16)
    logits[0, corner // 2 : corner // 2 + 4, corner // 2 : corner // 2 + 4] = 6
    return Prompts(boxes=boxes, mask_logits=logits, mask_present=np.array([1, 0, 0], np.uint8))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(prefetcher, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(prefetcher, "_MAX_PAUSE", 0.05)


@pytest.fixture
def unlabeled(dataset, tiny):
    return slices_of(dataset, read_splits(dataset, tiny().data).unlabeled)


@pytest.fixture
def names(unlabeled):
    return [s.name for s in unlabeled]


@pytest.fixture
def name_of(dataset, unlabeled):
    """Image id to name."""
    return {image_digest(dataset.image(s)): s.name for s in unlabeled}


@pytest.fixture
def feed_of(wired, dataset, bank, tiny, tmp_path):
    """Make feeds; they are closed when the test ends."""
    opened = []

    def make(*overrides, **options):
        cache = FolderCache(tmp_path / "labels")
        config = tiny(*overrides).annotator
        opened.append(AnnotationFeed(wired, dataset, bank, cache, config, **options))
        return opened[-1]

    yield make
    for feed in opened:
        feed.close()


class Gate:
    """Holds each request to /segment until it is opened; `arrived` tells that one waits."""

    def __init__(self, wire):
        self.arrived, self.opened = threading.Event(), threading.Event()
        wire.fault = self

    def __call__(self, request):
        if request.url.path == "/segment":
            self.arrived.set()
            assert self.opened.wait(30)


def wait_for(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def test_labels_come_in_the_order_of_need_one_request_an_image(feed_of, wire, names, name_of):
    gate = Gate(wire)
    feed = feed_of("annotator.batch=2")
    wanted = names[::-1]
    feed.prefetch(wanted[:3])
    assert gate.arrived.wait(30)
    feed.prefetch(wanted)  # those on their way are not asked twice
    gate.opened.set()
    labels = feed.get(wanted)
    assert len(labels) == len(wanted)
    feed.prefetch(names)
    feed.get(names)
    asked = [[name_of[i] for i in ids] for ids in wire.asked]
    assert [n for ids in asked for n in ids] == wanted
    assert max(len(ids) for ids in asked) == 2
    assert feed.stats()["images"] == len(names)
    assert feed.stats()["requests"] == len(wire.asked)


def test_what_another_process_asks_for_is_waited_for_and_not_asked(feed_of, wire, names, tmp_path):
    one, other = feed_of(), feed_of()
    gate = Gate(wire)
    one.prefetch(names[:2])
    assert gate.arrived.wait(30)
    other.prefetch(names[:3])
    wait_for(lambda: len(wire.asked) == 2)  # the third image is nobody's yet
    gate.opened.set()
    assert [len(feed.get(names[:3])) for feed in (other, one)] == [3, 3]
    assert sorted(len(ids) for ids in wire.asked) == [1, 2]
    assert one.stats()["images"] + other.stats()["images"] == 3
    assert list((tmp_path / "labels").glob("*/.*.claim")) == []


def test_what_somebody_waits_for_comes_first(feed_of, wire, names, name_of):
    gate = Gate(wire)
    feed = feed_of("annotator.batch=1")
    feed.prefetch(names[:4])
    assert gate.arrived.wait(30)
    threading.Timer(0.2, gate.opened.set).start()
    feed.take([names[5], names[3]])
    feed.get(names[:4])
    assert [name_of[i] for ids in wire.asked for i in ids] == [names[i] for i in (0, 5, 3, 1, 2)]
    assert feed.stats()["wait_seconds"] > 0


def test_the_old_label_stays_in_use_until_the_new_one_comes(feed_of, wire, names):
    feed = feed_of()
    (old,) = feed.get(names[:1])
    gate = Gate(wire)
    feed.refresh(names[:1], [prompts_of(8)])
    assert gate.arrived.wait(30)
    assert feed.get(names[:1])[0] is old
    gate.opened.set()
    wait_for(lambda: feed.stats()["refreshed"] == 1)
    (new,) = feed.get(names[:1], newest=True)
    assert new is not old
    assert not np.array_equal(new.confidence, old.confidence)
    assert wire.by_id == [False, True]


def test_an_exact_feed_waits_for_the_new_label(feed_of, wire, names):
    feed = feed_of(exact=True)
    (old,) = feed.get(names[:1])
    gate = Gate(wire)
    feed.refresh(names[:1], [prompts_of(8)])
    threading.Timer(0.2, gate.opened.set).start()
    (new,) = feed.take(names[:1]).labels
    assert new is not old
    assert not np.array_equal(new.confidence, old.confidence)
    feed.refresh(names[:1], [prompts_of(4)])
    feed.refresh(names[:1], [prompts_of(12)])
    (newest,) = feed.take(names[:1]).labels
    assert feed._answers[names[0]].boxes[0].tolist() == [12, 12, 20, 20]
    assert not np.array_equal(newest.confidence, new.confidence)


def test_first_labels_go_before_refreshed_ones(feed_of, wire, names, name_of):
    feed = feed_of("annotator.batch=1")
    feed.get(names[:3])
    gate = Gate(wire)
    feed.refresh(names[:3], [prompts_of(8)] * 3)
    assert gate.arrived.wait(30)
    feed.prefetch(names[3:5])
    gate.opened.set()
    wait_for(lambda: feed.stats()["refreshed"] == 3)
    assert [name_of[i] for ids in wire.asked[3:] for i in ids] == [names[i] for i in (0, 3, 4, 1, 2)]


def test_of_two_sets_of_prompts_the_newer_counts(feed_of, wire, names):
    feed = feed_of()
    feed.get(names[:2])
    gate = Gate(wire)
    feed.refresh(names[:1], [prompts_of(4)])
    assert gate.arrived.wait(30)  # the first set is on its way
    feed.refresh(names[:2], [prompts_of(8)] * 2)
    feed.refresh(names[:2], [prompts_of(16)] * 2)  # the second was never sent
    gate.opened.set()
    wait_for(lambda: feed.stats()["refreshed"] == 3)
    last = feed.get(names[:2], newest=True)
    assert len(wire.asked) == 3
    # the cache says which prompts the labels answer: the newest need no request
    other = feed_of()
    other.get(names[:2])
    other.refresh(names[:2], [prompts_of(16)] * 2)
    wait_for(lambda: other.stats()["refreshed"] == 2)
    for ours, theirs in zip(other.get(names[:2], newest=True), last, strict=True):
        assert np.array_equal(ours.confidence, theirs.confidence)
    assert other.stats()["requests"] == 0


def test_prompts_for_an_image_without_a_label_go_with_its_first_request(feed_of, wire, names):
    gate = Gate(wire)
    feed = feed_of("annotator.batch=1")
    feed.prefetch(names[:2])
    assert gate.arrived.wait(30)
    feed.refresh(names[1:2], [prompts_of(8)])
    gate.opened.set()
    feed.get(names[:2])
    assert len(wire.asked) == 2
    assert feed.stats()["refreshed"] == 0  # nothing was replaced


def test_an_annotator_that_is_away_is_waited_for(feed_of, wire, names, answer_of, caplog):
    answers = [answer_of(503, "not_ready"), answer_of(429, "queue_full"), None]

    def fault(request):
        if request.url.path == "/segment" and answers:
            answer = answers.pop(0)
            if answer is None:
                raise httpx.ConnectError("refused")
            return answer
        return None

    feed = feed_of()
    wire.fault = fault
    labels = feed.get(names[:3])
    assert all(label.confidence.any() for label in labels)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 2
    assert said[0].startswith("waiting for the annotator: not_ready")
    assert said[1] == "the annotator answers again"
    assert feed.stats()["interruptions"] == 1
    assert feed.stats()["failed_items"] == 0


def test_patience_ends(feed_of, wire, names, answer_of):
    feed = feed_of("annotator.patience_s=2")
    feed.get(names[:1])
    wire.fault = lambda _: answer_of(503, "not_ready")
    with pytest.raises(Unreachable, match="waited .* s for labels of 2 images: not_ready, says the test"):
        feed.get(names[:3])
    assert len(feed.get(names[:1])) == 1  # what is there is there
    wire.fault = None
    assert len(feed.get(names[:3])) == 3  # and a later call may go on


def test_a_step_goes_on_without_labels_that_are_late(feed_of, wire, names, caplog):
    feed = feed_of("annotator.max_wait_s=0.05", "annotator.batch=2")
    (first,) = feed.get(names[:1])
    gate = Gate(wire)
    with caplog.at_level(logging.WARNING):
        assert feed.take(names[:3]).labels == [first, None, None]
        assert feed.take(names[1:2]).labels == [None]
    assert [r.getMessage() for r in caplog.records] == [
        "labels come late: steps go on without them, as annotator.max_wait_s says"
    ]
    gate.opened.set()
    wait_for(lambda: None not in feed.take(names[:3]).labels)  # used when they come
    taken, late = (feed.stats()[k] for k in ("taken", "late"))
    assert late >= 3
    assert (taken - 4) % 3 == 0
    assert [n for ids in wire.asked for n in ids] == list(dict.fromkeys(n for ids in wire.asked for n in ids))


def test_without_a_limit_a_step_takes_every_label(feed_of, names):
    feed = feed_of()
    assert None not in feed.take(names[:3]).labels
    assert (feed.stats()["taken"], feed.stats()["late"]) == (3, 0)


def test_patience_ends_for_steps_that_go_on_without_labels(feed_of, wire, names, answer_of):
    feed = feed_of("annotator.patience_s=0.3", "annotator.max_wait_s=0")
    wire.fault = lambda _: answer_of(503, "not_ready")
    assert feed.take(names[:2]).labels == [None, None]

    def left():
        try:
            feed.take(names[:2])
        except Unreachable as error:
            return "labels of 2 images: not_ready" in error.message
        return False

    wait_for(left)


def test_a_wrong_key_raises_at_once(feed_of, wire, names, answer_of):
    feed = feed_of("annotator.patience_s=600")
    wire.fault = lambda _: answer_of(401, "unauthorized")
    for _ in range(2):
        with pytest.raises(Unauthorized, match="unauthorized, says the test"):
            feed.get(names[:1])


def test_labels_of_another_run_need_no_request(feed_of, wire, names):
    feed_of().get(names)
    before = len(wire.asked)
    again = feed_of()
    again.get(names)
    assert len(wire.asked) == before
    assert again.stats()["cache_hits"] == len(names)


def test_labels_let_go_from_memory_come_back_from_the_cache(feed_of, wire, names):
    feed = feed_of("annotator.batch=1", kept=2)
    first = [feed.get([name])[0] for name in names[:5]]
    again = [feed.get([name])[0] for name in names[:5]]
    assert len(wire.asked) == 5
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.labels, other.labels)
    assert feed.stats()["cache_hits"] >= 3


def test_what_labels_are_worth_is_measured_where_the_truth_is_known(feed_of, dataset, unlabeled, names):
    feed = feed_of()
    assert "label_dice" not in feed.stats()
    labels = feed.get(names)
    truth, ours = np.stack([dataset.mask(s) for s in unlabeled]), np.stack([x.labels for x in labels])
    pairs = [(truth == c, ours == c) for c in dataset.classes]
    dice = [2 * (t & o).sum() / (t.sum() + o.sum()) for t, o in pairs]
    assert feed.stats()["label_dice"] == pytest.approx(np.mean(dice), abs=1e-4)
    assert "echo_after" not in feed.stats()
    feed.refresh(names[:2], [prompts_of(8)] * 2)
    wait_for(lambda: feed.stats()["refreshed"] == 2)
    assert {"echo_before", "echo_after"} <= set(feed.stats())


def test_an_unreadable_mask_of_an_unlabeled_image_harms_nothing(wired, bank, tiny, tmp_path, phantoms, names):
    shutil.copytree(phantoms, tmp_path / "heart")
    for path in (tmp_path / "heart" / "masks").iterdir():
        path.write_bytes(b"no PNG")
    dataset = open_dataset(tmp_path / "heart")
    feed = AnnotationFeed(wired, dataset, bank, FolderCache(tmp_path / "labels"), tiny().annotator)
    assert len(feed.get(names[:2])) == 2
    assert "label_dice" not in feed.stats()
    feed.close()


def test_closing_ends_the_background_thread(feed_of, names):
    before = threading.active_count()
    feed = feed_of()
    feed.get(names[:1])
    assert threading.active_count() == before + 1
    feed.close()
    feed.close()
    assert threading.active_count() == before
