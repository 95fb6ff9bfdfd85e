"""The paper's inference on the untrained nano model: retrieval, prompts, fusion, caches."""

from dataclasses import replace

import numpy as np
import pytest

from vessa.codec import image_digest
from vessa.errors import InvalidImage, NoTemplate, UnknownBank, UnknownClass, UnknownImage
from vessa_server.inference.annotator import Annotator
from vessa_server.model.language.prefix_cache import InProcess
from vessa_server.model.weights import directory
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import SegmentItem, SegmentResult, TemplateItem

CLASSES = {1: "liver", 4: "spleen"}


def example(seed, size=(60, 80)):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, size, dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[10:30, 10 + seed : 40 + seed] = 1
    mask[35:50, 20:50] = 4
    return image, mask


@pytest.fixture(scope="module")
def model(nano_weights):
    return directory.read(nano_weights)


@pytest.fixture
def annotator(model, tmp_path):
    annotator = Annotator(model[0], TemplateBanks(FolderStore(tmp_path)), 1 << 28, model[1])
    items = [TemplateItem(*example(seed), CLASSES, f"patient{seed}") for seed in range(3)]
    annotator.banks.add("abdomen", annotator.encode_templates(items))
    return annotator


def query(seed=7, size=(60, 80), **options):
    image = example(seed, size)[0]
    return SegmentItem(image_digest(image), image, "abdomen", **options)


def the_only(results) -> SegmentResult:
    assert isinstance(results[0], SegmentResult), results[0]
    return results[0]


def test_labels_are_the_banks_class_ids_at_the_images_own_size(annotator):
    result = the_only(annotator.segment([query(size=(50, 90), probabilities=True)]))
    assert result.labels.shape == result.confidence.shape == (50, 90)
    assert result.labels.dtype == result.confidence.dtype == np.uint8
    assert set(np.unique(result.labels)) <= {0, 1, 4}
    assert result.class_ids == (1, 4)
    probabilities = result.probabilities.astype(np.float32)
    assert probabilities.shape == (3, 50, 90)
    assert np.allclose(probabilities.sum(0), 1, atol=5e-3)
    assert np.allclose(probabilities.max(0) * 255, result.confidence, atol=2)


def test_classes_are_fused_by_softmax_over_zero_and_their_logits(annotator):
    both = the_only(annotator.segment([query(probabilities=True)])).probabilities.astype(np.float64)
    alone = [
        the_only(annotator.segment([query(probabilities=True, classes=(name,))])).probabilities.astype(
            np.float64
        )
        for name in ("liver", "spleen")
    ]
    odds = [a[1] / a[0] for a in alone]  # exp(z) of each class by itself
    total = 1 + odds[0] + odds[1]
    assert np.allclose(both[0], 1 / total, atol=5e-3)
    assert np.allclose(both[2], odds[1] / total, atol=5e-3)


def test_a_batch_gives_what_its_images_give_alone(annotator):
    items = [query(1), query(2, (40, 44)), query(3, classes=("spleen",)), query(1, template_choice="top3")]
    together = annotator.segment(items)
    for item, result in zip(items, together, strict=True):
        alone = the_only(annotator.segment([item]))
        assert (alone.labels != result.labels).mean() < 1e-3
        assert np.abs(alone.confidence.astype(int) - result.confidence).max() <= 2


def test_the_querys_own_patient_is_never_its_template(annotator):
    image = example(1)[0]
    item = SegmentItem(image_digest(image), image, "abdomen")
    free = the_only(annotator.segment([item])).templates["liver"][0]
    assert free.group == "patient1"
    assert free.similarity == pytest.approx(1, abs=1e-3)
    own = SegmentItem(item.image_id, image, "abdomen", group="patient1", template_choice="top3")
    groups = {t.group for uses in the_only(annotator.segment([own])).templates.values() for t in uses}
    assert groups == {"patient0", "patient2"}


def test_sampling_is_seeded_and_varies(annotator):
    def drawn(seed):
        result = the_only(annotator.segment([query(template_choice="sample", seed=seed)]))
        return result.templates["liver"][0].id

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(12)}) > 1


def test_a_cached_image_needs_no_pixels(annotator):
    item = query()
    first = the_only(annotator.segment([item]))
    assert annotator.holds(item.image_id)
    again = the_only(annotator.segment([SegmentItem(item.image_id, None, "abdomen")]))
    assert np.array_equal(first.labels, again.labels)


def test_a_request_that_only_adds_prompts_runs_the_mask_decoder_alone(annotator):
    item = query()
    first = the_only(annotator.segment([item]))
    spent = dict(annotator.stage_seconds())
    box = np.full((2, 4), -1, np.float32)
    box[0] = 5, 5, 40, 30
    prompted = SegmentItem(item.image_id, None, "abdomen", boxes=box)
    answers = [the_only([a]) for a in annotator.segment([prompted, prompted])]
    assert annotator.stage_seconds()["language"] == spent["language"]
    assert annotator.stage_seconds()["attend"] == spent["attend"]
    assert np.array_equal(answers[0].labels, answers[1].labels)
    assert answers[0].scores != first.scores
    # Another class, or another template, needs new conditioned features.
    annotator.segment([SegmentItem(item.image_id, None, "abdomen", template_choice="top3")])
    assert annotator.stage_seconds()["attend"] > spent["attend"]


def test_one_budget_counts_images_conditioned_features_and_templates(model, annotator):
    item = query()
    roomy = Annotator(model[0], annotator.banks, 1 << 30, model[1])
    roomy.segment([item])
    whole, kept = roomy._cache.nbytes, dict(roomy._cache)
    assert whole == sum(value.nbytes for value in kept.values())
    assert {key[0] for key in kept if key != item.image_id} == {"memory", "prefix"}
    grown = kept[item.image_id].nbytes
    roomy.leave_out(frozenset())
    assert kept[item.image_id].nbytes < grown
    tight = Annotator(model[0], annotator.banks, grown - 1, model[1])
    the_only(tight.segment([item]))
    assert not tight.holds(item.image_id)
    assert tight._cache.nbytes < grown


def test_a_cached_image_is_not_evicted_by_its_own_batch(model, annotator):
    first = query(1)
    size = Annotator(model[0], annotator.banks, 1 << 30, model[1])
    size.segment([first])
    tight = Annotator(model[0], annotator.banks, size._cache.nbytes, model[1])  # room for one image
    the_only(tight.segment([first]))
    assert tight.holds(first.image_id)
    answers = tight.segment([query(2), SegmentItem(first.image_id, None, "abdomen"), first])
    assert all(isinstance(a, SegmentResult) for a in answers), answers


def test_a_template_is_read_once_for_all_images(annotator, monkeypatch):
    first = query(11)
    the_only(annotator.segment([first]))
    monkeypatch.setattr(InProcess, "read_templates", lambda *_: pytest.fail("the template was read before"))
    the_only(annotator.segment([replace(first, image_id="sha256:another")]))


def test_an_image_larger_than_the_budget_is_not_cached(model, annotator):
    small = Annotator(model[0], annotator.banks, 1, model[1])
    item = query()
    the_only(small.segment([item]))
    assert not small.holds(item.image_id)


def test_each_kind_of_prompt_changes_the_answer(annotator):
    plain = the_only(annotator.segment([query(probabilities=True)])).probabilities
    none = np.full((2, 4), -1, np.float32)
    box = none.copy()
    box[0] = 5, 5, 40, 30
    logits = np.full((2, 15, 20), -4, np.float16)
    logits[0, 3:9, 4:12] = 4
    points = np.array([[[20.0, 20.0]], [[0.0, 0.0]]], np.float32)
    labels = np.array([[1], [-1]], np.int8)
    prompts = [
        {"boxes": box},
        {"points": points, "point_labels": labels},
        {"mask_logits": logits, "mask_present": np.array([1, 0], np.uint8)},
    ]
    for prompt in prompts:
        prompted = the_only(annotator.segment([query(probabilities=True, **prompt)])).probabilities
        assert not np.allclose(plain, prompted, atol=1e-3), prompt.keys()
    absent = {"boxes": none, "mask_logits": logits, "mask_present": np.zeros(2, np.uint8)}
    same = the_only(annotator.segment([query(probabilities=True, **absent)])).probabilities
    assert np.allclose(plain, same, atol=2e-3)


def test_one_items_error_does_not_affect_the_others(annotator):
    good = query()
    faults = [
        SegmentItem("sha256:0", None, "abdomen"),
        SegmentItem(good.image_id, good.image, "no-such-bank"),
        query(classes=("pancreas",)),
    ]
    results = annotator.segment([faults[0], good, *faults[1:]])
    assert [type(r) for r in results] == [UnknownImage, SegmentResult, UnknownBank, UnknownClass]
    assert np.array_equal(results[1].labels, the_only(annotator.segment([good])).labels)
    assert "it has ['liver', 'spleen']" in results[3].message


def test_a_bank_of_the_querys_patient_alone_has_no_template(model, tmp_path):
    annotator = Annotator(model[0], TemplateBanks(FolderStore(tmp_path)), 1 << 28, model[1])
    annotator.banks.add("abdomen", annotator.encode_templates([TemplateItem(*example(0), CLASSES, "p")]))
    result = annotator.segment([query(group="p")])[0]
    assert isinstance(result, NoTemplate)


def test_a_template_holds_the_classes_it_shows_and_their_memories(annotator):
    image, mask = example(5)
    mask[mask == 4] = 0
    template = annotator.encode_templates([TemplateItem(image, mask, CLASSES, "p")])[0]
    assert template.classes == {1: "liver"}
    assert template.whole.memories[1].dtype == np.float16
    assert np.linalg.norm(template.whole.feature) == pytest.approx(1, abs=1e-5)
    empty = annotator.encode_templates([TemplateItem(image, mask * 0, CLASSES, "p")])[0]
    assert isinstance(empty, InvalidImage)
