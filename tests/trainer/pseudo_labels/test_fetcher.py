"""One batch of labels: cache first, pixels once, faults told apart."""

import httpx
import numpy as np
import pytest

from vessa.client import AnnotatorClient, Prompts
from vessa.codec import image_digest
from vessa.datasets import open_dataset
from vessa.errors import NoTemplate, Unauthorized, UnknownBank, VessaError
from vessa_server.pretraining.data.phantoms import write_phantoms
from vessa_trainer.data.splits import read_splits, slices_of
from vessa_trainer.pseudo_labels.annotator_check import AnnotatorChanged
from vessa_trainer.pseudo_labels.cache import FolderCache
from vessa_trainer.pseudo_labels.fetcher import LabelFetcher, LabelQuery
from vessa_trainer.pseudo_labels.template_bank import seed_labeled

BOX = Prompts(boxes=np.array([[4, 4, 20, 20], [4, 4, 20, 20], [-1, -1, -1, -1]], np.float32))


@pytest.fixture
def cache(tmp_path):
    return FolderCache(tmp_path / "labels")


@pytest.fixture
def unlabeled(dataset, tiny):
    """Slices of the unlabeled patients."""
    return slices_of(dataset, read_splits(dataset, tiny().data).unlabeled)


@pytest.fixture
def fetcher(wired, dataset, bank, cache, tiny):
    return LabelFetcher(wired, dataset, bank, cache, tiny().annotator, 0)


def ids_of(dataset, items):
    return [image_digest(dataset.image(s)) for s in items]


def test_labels_have_the_size_of_the_image_and_the_classes_of_the_bank(fetcher, dataset, bank, unlabeled):
    fetched = fetcher.fetch([LabelQuery(s) for s in unlabeled[:3]])
    assert [w.item for w, _ in fetched.labels] == unlabeled[:3]
    assert (fetched.late, fetched.reason, fetched.asked) == ([], None, True)
    for _, label in fetched.labels:
        assert label.labels.shape == label.confidence.shape == (32, 32)
        assert label.labels.dtype == label.confidence.dtype == np.uint8
        assert set(np.unique(label.labels)) <= {0, *bank.classes}
        assert label.confidence.max() > 0
    assert fetcher.class_ids == sorted(dataset.classes)
    assert (fetcher.requests, fetcher.images, fetcher.cache_hits, fetcher.failed_items) == (1, 3, 0, 0)


def test_cached_labels_need_no_request(fetcher, wired, wire, dataset, bank, cache, tiny, unlabeled):
    first = fetcher.fetch([LabelQuery(s) for s in unlabeled[:2]])
    other = LabelFetcher(wired, dataset, bank, cache, tiny().annotator, 0)
    again = other.fetch([LabelQuery(s) for s in unlabeled[:3]])
    assert len(wire.asked) == 2
    assert wire.asked[1] == ids_of(dataset, unlabeled[2:3])
    assert (other.requests, other.images, other.cache_hits) == (1, 1, 2)
    labels = {w.item.name: label for w, label in again.labels}
    for wanted, label in first.labels:
        assert np.array_equal(labels[wanted.item.name].labels, label.labels)
    assert not other.fetch([LabelQuery(unlabeled[0])]).asked


def test_prompts_make_another_label(fetcher, wire, unlabeled):
    fetcher.fetch([LabelQuery(unlabeled[0])])
    fetcher.fetch([LabelQuery(unlabeled[0], BOX)])
    assert len(wire.asked) == 2
    assert fetcher.fetch([LabelQuery(unlabeled[0], BOX)]).asked is False


def test_known_images_are_asked_by_their_id(fetcher, wire, dataset, unlabeled):
    fetcher.fetch([LabelQuery(s) for s in unlabeled[:2]])
    fetcher.fetch([LabelQuery(s, BOX) for s in unlabeled[:3]])
    assert wire.by_id == [False, True, False]
    assert wire.asked[1] == ids_of(dataset, unlabeled[:2])
    assert wire.asked[2] == ids_of(dataset, unlabeled[2:3])


def test_ids_of_images_of_different_sizes_go_in_requests_of_their_own(fetcher, wire, dataset, unlabeled):
    wide = np.pad(dataset.image(unlabeled[1]), ((0, 0), (0, 8)))
    fetcher.fetch([LabelQuery(unlabeled[0]), LabelQuery(unlabeled[1], image=wide)])
    fetched = fetcher.fetch([LabelQuery(unlabeled[0], BOX), LabelQuery(unlabeled[1], BOX, image=wide)])
    assert wire.by_id == [False, False, True, True]
    assert sorted(label.labels.shape for _, label in fetched.labels) == [(32, 32), (32, 40)]
    assert fetcher.failed_items == 0


def test_ids_that_the_annotator_forgot_are_sent_again_as_pixels(wired, wire, cache, client, tiny, tmp_path):
    write_phantoms(tmp_path, patients=6, slices=1, size=32, seed=77)  # images it has never seen
    dataset = open_dataset(tmp_path / "heart")
    config = tiny(f"data.root={dataset.root}")
    fetcher = LabelFetcher(wired, dataset, seed_labeled(client, dataset, config), cache, config.annotator, 0)
    one, other = slices_of(dataset, read_splits(dataset, config.data).unlabeled)[:2]
    fetcher.fetch([LabelQuery(one)])
    fetcher._sent[other.name] = (32, 32)  # as if sent before the annotator was restarted
    fetched = fetcher.fetch([LabelQuery(one, BOX), LabelQuery(other, BOX)])
    assert [w.item for w, _ in fetched.labels] == [one, other]
    assert all(label.confidence.any() for _, label in fetched.labels)
    assert wire.by_id == [False, True, False]
    assert wire.asked[2] == ids_of(dataset, [other])
    assert fetcher.failed_items == 0


def test_a_whole_request_of_forgotten_ids_is_sent_again(fetcher, wire, dataset, unlabeled, answer_of):
    fetcher.fetch([LabelQuery(s) for s in unlabeled[:2]])
    wire.fault = lambda _: answer_of(404, "unknown_image") if wire.by_id[-1] else None
    fetched = fetcher.fetch([LabelQuery(s, BOX) for s in unlabeled[:2]])
    assert len(fetched.labels) == 2
    assert wire.by_id == [False, True, False]
    assert wire.asked[2] == ids_of(dataset, unlabeled[:2])


def test_an_item_that_fails_teaches_nothing_is_counted_and_not_kept(
    fetcher, dataset, tiny, unlabeled, cache, caplog
):
    """A patient is never segmented by its own templates: the labeled one has no others."""
    labeled = slices_of(dataset, read_splits(dataset, tiny().data).labeled)[0]
    fetched = fetcher.fetch([LabelQuery(labeled), LabelQuery(unlabeled[0])])
    (_, failed), (_, fine) = fetched.labels
    assert failed.labels.shape == (32, 32)
    assert not failed.labels.any()
    assert not failed.confidence.any()
    assert fine.confidence.any()
    assert fetched.late == []
    assert fetcher.failed_items == 1
    assert f"no label for {labeled.name}" in caplog.text
    assert len([p for p in cache.folder.rglob("*") if p.is_file()]) == 1
    assert NoTemplate.code == "no_template"


@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "queue_full"), (503, "not_ready"), (503, "store_unavailable"), (504, "deadline_exceeded")],
)
def test_what_passes_by_itself_makes_labels_late(fetcher, wire, unlabeled, answer_of, status, code):
    wire.fault = lambda _: answer_of(status, code)
    wanted = [LabelQuery(s) for s in unlabeled[:2]]
    fetched = fetcher.fetch(wanted)
    assert fetched.labels == []
    assert fetched.late == wanted
    assert fetched.reason.code == code
    assert not fetched.asked
    wire.fault = None
    assert len(fetcher.fetch(fetched.late).labels) == 2


def test_a_connection_that_breaks_or_a_proxy_that_answers_makes_labels_late(fetcher, wire, unlabeled):
    def broken(_):
        raise httpx.ConnectError("refused")

    wire.fault = broken
    assert fetcher.fetch([LabelQuery(unlabeled[0])]).reason.code == "unreachable"
    wire.fault = lambda _: httpx.Response(502, text="<html>Bad Gateway</html>")
    assert fetcher.fetch([LabelQuery(unlabeled[0])]).reason.code == "bad_response"


def spoil(index, code):
    def rewrite(items):
        error = {"code": code, "message": "says the test", "item": index}
        items[index] |= {"status": "error", "error": error}

    return rewrite


def test_one_late_item_does_not_hold_up_the_others(fetcher, wire, unlabeled):
    wire.rewrite = spoil(1, "deadline_exceeded")
    fetched = fetcher.fetch([LabelQuery(s) for s in unlabeled[:3]])
    assert [w.item for w, _ in fetched.labels] == [unlabeled[0], unlabeled[2]]
    assert [w.item for w in fetched.late] == [unlabeled[1]]
    assert fetched.asked


def test_an_image_that_the_annotator_always_fails_on_is_given_up(fetcher, wire, unlabeled, caplog):
    wire.rewrite = spoil(0, "internal")
    tries = 0
    late = [LabelQuery(unlabeled[0])]
    while late:
        fetched = fetcher.fetch(late)
        late, tries = fetched.late, tries + 1
    assert tries == 3
    assert not fetched.labels[0][1].confidence.any()
    assert fetcher.failed_items == 1
    assert "no label for" in caplog.text


def test_a_wrong_key_raises(annotator, dataset, bank, cache, tiny, fetcher, wire, unlabeled, answer_of):
    with (
        AnnotatorClient(annotator.url, "another-key-0123456789") as stranger,
        pytest.raises(Unauthorized),
    ):
        LabelFetcher(stranger, dataset, bank, cache, tiny().annotator, 0)
    wire.fault = lambda _: answer_of(401, "unauthorized")
    with pytest.raises(Unauthorized):
        fetcher.fetch([LabelQuery(unlabeled[0])])


def test_a_bank_that_was_deleted_raises(client, wired, dataset, cache, tiny, unlabeled):
    config = tiny("annotator.bank=to-be-deleted")
    fetcher = LabelFetcher(wired, dataset, seed_labeled(client, dataset, config), cache, config.annotator, 0)
    client.delete_bank("to-be-deleted")
    with pytest.raises(UnknownBank):
        fetcher.fetch([LabelQuery(unlabeled[0])])


def test_a_bank_that_changes_stops_the_run_unless_that_is_allowed(
    client, wired, dataset, cache, tiny, unlabeled
):
    config = tiny("annotator.bank=growing")
    before = seed_labeled(client, dataset, config)
    fetcher = LabelFetcher(wired, dataset, before, cache, config.annotator, 0)
    extra = unlabeled[-2]
    client.add_templates(
        "growing", [dataset.image(extra)], [dataset.mask(extra)], dataset.classes, [extra.group]
    )
    with pytest.raises(AnnotatorChanged, match="bank digest was .* and is .*annotator.allow_change=true"):
        fetcher.fetch([LabelQuery(unlabeled[0])])
    after = client.bank("growing")
    assert after.version > before.version
    allowed = tiny("annotator.allow_change=true").annotator
    fetcher = LabelFetcher(wired, dataset, before, cache, allowed, 0)
    assert fetcher.fetch([LabelQuery(unlabeled[0])]).asked
    assert fetcher.annotator_changes == [f"bank digest was {before.digest} and is {after.digest}"]
    # The label is in the cache under the version that made it.
    newer = LabelFetcher(wired, dataset, after, cache, config.annotator, 0)
    assert not newer.fetch([LabelQuery(unlabeled[0])]).asked


def test_every_error_that_waiting_does_not_cure_is_raised(fetcher, wire, unlabeled, answer_of):
    for status, code in ((413, "too_large"), (422, "invalid_request"), (403, "forbidden")):
        wire.fault = lambda _, status=status, code=code: answer_of(status, code)
        with pytest.raises(VessaError) as caught:
            fetcher.fetch([LabelQuery(unlabeled[0])])
        assert caught.value.code == code


def test_an_annotator_of_prompts_alone_labels_what_it_got_prompts_for(
    prompts_only, dataset, cache, tiny, unlabeled
):
    with AnnotatorClient(prompts_only.url, prompts_only.api_key) as client:
        bank = seed_labeled(client, dataset, tiny())
        fetcher = LabelFetcher(client, dataset, bank, cache, tiny().annotator, 0)
        ((_, silent),) = fetcher.fetch([LabelQuery(unlabeled[0])]).labels
        assert fetcher.requests == 0  # without prompts there is nothing to ask
        assert silent.labels.shape == (32, 32)
        assert not silent.confidence.any()
        fetched = fetcher.fetch([LabelQuery(unlabeled[0]), LabelQuery(unlabeled[1], BOX)])
        assert (fetcher.requests, fetcher.images) == (1, 1)
        labels = {w.item.name: label for w, label in fetched.labels}
        heard = labels[unlabeled[1].name]
        third = heard.labels == fetcher.class_ids[2]  # the class without a box
        assert not heard.confidence[third].any()
        assert heard.confidence[~third].any()
        (again,) = fetcher.fetch([LabelQuery(unlabeled[1], BOX)]).labels
        assert (again[1].confidence == heard.confidence).all()  # from the cache, silenced alike
        assert fetcher.cache_hits == 1
