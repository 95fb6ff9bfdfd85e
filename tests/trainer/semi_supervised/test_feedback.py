"""Teacher-to-VESSA feedback: prompts from probabilities, rounds at the right steps."""

import numpy as np
import pytest
import torch

from vessa_trainer.config import FeedbackConfig
from vessa_trainer.pseudo_labels.cache import open_cache
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.teacher_prompts import prompts_from
from vessa_trainer.pseudo_labels.template_bank import seed_labeled
from vessa_trainer.semi_supervised.feedback import FeedbackRounds
from vessa_trainer.semi_supervised.trainer import Interrupted, Run

ALL = FeedbackConfig(prompts=("boxes", "points", "mask_logits"), min_confidence=0.8)


def stop_after_4(step):
    if step == 4:
        raise KeyboardInterrupt


def probabilities_of(*regions, size=(20, 30), classes=4):
    """Background everywhere but in regions (class, rows, columns, probability)."""
    probability = torch.zeros(classes, *size)
    probability[0] = 1
    for class_id, rows, columns, value in regions:
        probability[:, rows, columns] = (1 - value) / (classes - 1)
        probability[class_id, rows, columns] = value
    return probability


def test_a_confident_class_gets_box_point_and_mask():
    prompts = prompts_from(probabilities_of((1, slice(5, 10), slice(8, 15), 0.95)), [1, 2, 3], ALL)
    assert prompts.boxes[0].tolist() == [8, 5, 15, 10]  # XYXY px, the ends not included
    assert prompts.point_labels.tolist() == [[1], [-1], [-1]]
    assert prompts.mask_present.tolist() == [1, 0, 0]
    x, y = prompts.points[0, 0]
    assert 5 < y < 10
    assert 8 < x < 15
    assert abs(y - 7.5) < 0.51  # the deepest pixel: in the middle row


def test_a_class_that_is_absent_gets_nothing():
    prompts = prompts_from(probabilities_of((1, slice(5, 10), slice(8, 15), 0.95)), [1, 2, 3], ALL)
    assert (prompts.boxes[1:] == -1).all()
    assert (prompts.points[1:] == 0).all()
    assert (prompts.mask_logits[1:] < 0).all()


def test_prompts_come_in_the_order_of_the_bank():
    regions = [(1, slice(2, 6), slice(2, 6), 0.9), (3, slice(10, 16), slice(20, 26), 0.9)]
    prompts = prompts_from(probabilities_of(*regions), [3, 1], ALL)
    assert prompts.boxes.tolist() == [[20, 10, 26, 16], [2, 2, 6, 6]]
    assert prompts.mask_logits.shape == (2, 20, 30)


def test_the_largest_confident_component_is_prompted():
    regions = [
        (1, slice(0, 10), slice(0, 10), 0.6),  # the largest, not confident
        (1, slice(12, 18), slice(2, 8), 0.9),
        (1, slice(12, 15), slice(20, 23), 0.99),
    ]
    prompts = prompts_from(probabilities_of(*regions), [1], ALL)
    assert prompts.boxes.tolist() == [[2, 12, 8, 18]]


def test_an_unsure_source_prompts_nothing():
    prompts = prompts_from(probabilities_of((1, slice(5, 10), slice(8, 15), 0.7)), [1], ALL)
    assert prompts.boxes.tolist() == [[-1, -1, -1, -1]]
    assert prompts.mask_present.tolist() == [0]


def test_a_speck_is_no_structure():
    speck = probabilities_of((1, slice(5, 6), slice(8, 9), 1.0), size=(100, 100))
    assert prompts_from(speck, [1], ALL).mask_present.tolist() == [0]


def test_the_point_lies_inside_a_ring():
    ring = torch.zeros(2, 21, 21)
    y, x = torch.meshgrid(torch.arange(21) - 10, torch.arange(21) - 10, indexing="ij")
    ring[1] = (((x**2 + y**2) > 36) & ((x**2 + y**2) < 100)).float()
    ring[0] = 1 - ring[1]
    px, py = prompts_from(ring, [1], ALL).points[0, 0]
    assert ring[1, int(py), int(px)] == 1


def test_mask_logits_are_log_odds_within_their_limit():
    prompts = prompts_from(probabilities_of((1, slice(5, 10), slice(8, 15), 0.9)), [1, 2], ALL)
    logits = prompts.mask_logits
    assert logits.dtype == np.float16
    assert logits[0, 7, 10] == pytest.approx(np.log(9), rel=1e-2)
    assert logits[0, 0, 0] == -6
    assert np.abs(logits).max() <= 6


def test_large_images_get_a_coarse_mask_of_the_same_shape():
    prompts = prompts_from(
        probabilities_of((1, slice(40, 120), slice(30, 90), 0.95), size=(160, 320)), [1], ALL
    )
    assert prompts.mask_logits.shape == (1, 32, 64)
    assert prompts.mask_logits[0, 16, 12] > 2
    assert prompts.mask_logits[0, 2, 60] == -6
    assert prompts.boxes.tolist() == [[30, 40, 90, 120]]  # boxes stay in px of the image


def test_only_the_chosen_prompts_are_sent():
    probability = probabilities_of((1, slice(5, 10), slice(8, 15), 0.95))
    boxes = prompts_from(probability, [1], FeedbackConfig(prompts=("boxes",)))
    assert boxes.boxes is not None
    assert boxes.points is boxes.point_labels is boxes.mask_logits is boxes.mask_present is None
    points = prompts_from(probability, [1], FeedbackConfig(prompts=("points",)))
    assert points.boxes is points.mask_logits is None
    assert points.points.shape == (1, 1, 2)


def rounds_of(config, folder):
    """Rounds of which only the steps matter."""
    return FeedbackRounds(config, folder, feed=None, items=(), predict=lambda items: [])


def due_steps(rounds, steps):
    """Steps before which a round begins, walking as a run does."""
    begun = []
    for step in steps:
        if rounds.due(step):
            begun.append(step)
            rounds._round = rounds._number(step)
    return begun


def test_rounds_begin_in_the_middle_and_come_every_so_often(tiny, tmp_path):
    config = tiny("feedback.start=0.5", "feedback.every=3", steps=20)
    assert due_steps(rounds_of(config, tmp_path), range(20)) == [10, 13, 16, 19]
    from_the_start = tiny("feedback.start=0", "feedback.every=8", steps=20)
    assert due_steps(rounds_of(from_the_start, tmp_path), range(20)) == [0, 8, 16]


def test_a_resumed_run_begins_the_round_it_is_in(tiny, tmp_path):
    config = tiny("feedback.start=0.5", "feedback.every=3", steps=20)
    assert due_steps(rounds_of(config, tmp_path), range(14, 20)) == [14, 16, 19]
    assert due_steps(rounds_of(config, tmp_path), range(4, 12)) == [10]


@pytest.fixture
def run_of(client, dataset, tiny):
    """Make runs with feedback from the middle of six steps on; what they send is kept in `sent`."""
    feeds = []

    def make(*overrides):
        config = tiny("semi.method=vessa", "feedback.every=2", *overrides, steps=6)
        bank = seed_labeled(client, dataset, config)
        feed = AnnotationFeed(client, dataset, bank, open_cache(config.cache), config.annotator)
        feeds.append(feed)
        run = Run(config, dataset, feed, "vessa-trainer fit --resume")
        sent = []
        refresh = feed.refresh

        def noting(names, prompts):
            if names[0] in run.unlabeled.rows:  # not those of validation images
                sent.append((run.step, list(names)))
            refresh(names, prompts)

        feed.refresh = noting
        return run, sent

    yield make
    for feed in feeds:
        feed.close()


def coming(run, start, end):
    rows = [r for step in range(start, end) for r in run.unlabeled_order.rows(step)]
    return sorted({run.unlabeled.slices[r].name for r in rows})


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_a_round_sends_the_images_of_its_own_steps(run_of, source):
    run, sent = run_of(f"feedback.source={source}")
    run.train()
    assert [step for step, _ in sent] == [3, 5]
    assert sorted(sent[0][1]) == coming(run, 3, 5)
    assert sorted(sent[1][1]) == coming(run, 5, 6)
    assert run.feedback.sent == len(sent[0][1]) + len(sent[1][1])


def test_rounds_go_on_after_a_resume(run_of):
    run, sent = run_of()
    with pytest.raises(Interrupted):
        run.train(stop_after_4)
    assert [step for step, _ in sent] == [3]
    again, later = run_of()
    assert again.resume()
    ((step, names),) = later  # what is left of the round, with the prompts that it had
    assert (step, sorted(names)) == (4, coming(again, 4, 5))
    assert set(names) <= set(sent[0][1])
    again.train()
    assert [step for step, _ in later] == [4, 5]


def test_prompts_of_a_round_come_back_as_they_were(run_of):
    run, _ = run_of('feedback.prompts=["boxes","points","mask_logits"]', "feedback.min_confidence=0.3")
    with pytest.raises(Interrupted):
        run.train(stop_after_4)
    before = run.feed._prompts
    again, _ = run_of('feedback.prompts=["boxes","points","mask_logits"]', "feedback.min_confidence=0.3")
    again.resume()
    after = again.feed._prompts
    assert sorted(after) == coming(again, 4, 5)
    for name, prompts in after.items():
        for kind, value in vars(prompts).items():
            assert np.array_equal(value, getattr(before[name], kind))
            assert value.dtype == getattr(before[name], kind).dtype


def test_rounds_that_a_killed_run_began_after_its_checkpoint_are_begun_anew(run_of):
    run, _ = run_of()
    with pytest.raises(Interrupted):
        run.train(stop_after_4)
    folder = run.out / "feedback"
    assert [p.name for p in folder.iterdir()] == ["000000-0000.safetensors"]
    again, sent = run_of()
    (again.out / "last.safetensors").unlink()  # as if it had not been written yet
    again.resume()
    assert list(folder.iterdir()) == []
    assert sent == []


def test_rounds_that_are_over_are_forgotten(run_of):
    run, _ = run_of("feedback.start=0", "checkpoint_every=3")
    kept = {}
    run.train(lambda step: kept.update({step: sorted(p.name for p in (run.out / "feedback").iterdir())}))
    rounds = ["000000-0000.safetensors", "000001-0000.safetensors"]
    assert kept[2] == rounds[:1]
    assert kept[3] == rounds[1:]  # round 0 ended with step 2, and step 3 was saved


def test_without_feedback_nothing_is_sent(run_of):
    run, sent = run_of("feedback.enabled=false")
    run.train()
    assert run.feedback is None
    assert sent == []
