"""The losses against values worked by hand, equation by equation."""

import math
from dataclasses import replace

import pytest
import torch

from vessa_trainer.semi_supervised.losses import (
    StrongView,
    class_thresholds,
    consistency_loss,
    dice_loss,
    supervised_loss,
    teacher_loss,
    vessa_loss,
)


def logits_of(probabilities):
    """Logits (1, C, 1, N) whose softmax are the given (N, C) probabilities."""
    return torch.tensor(probabilities).log().T[None, :, None, :]


def test_equation_4_is_cross_entropy_plus_dice():
    logits = logits_of([[0.25, 0.75], [0.5, 0.5]])
    target = torch.tensor([[[1, 0]]])
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    cross_entropy = -(math.log(0.75) + math.log(0.5)) / 2
    dice = 1 - 2 * 0.75 / (0.75 + 0.5 + 1)
    loss = supervised_loss(logits, target, valid, 0.3, 0.7)
    assert loss.item() == pytest.approx(0.3 * cross_entropy + 0.7 * dice, rel=1e-4)


def test_padding_does_not_count_in_equation_4():
    logits = logits_of([[0.25, 0.75], [0.9, 0.1]])
    target = torch.tensor([[[1, 1]]])
    valid = torch.tensor([[[True, False]]])
    alone = supervised_loss(logits[..., :1], target[..., :1], valid[..., :1])
    assert supervised_loss(logits, target, valid).item() == pytest.approx(alone.item(), rel=1e-5)


def test_an_image_of_padding_alone_costs_no_cross_entropy_and_is_finite():
    logits = torch.zeros(1, 2, 2, 2, requires_grad=True)
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool)
    loss = supervised_loss(logits, torch.zeros(1, 2, 2, dtype=torch.long), nothing)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    target = torch.zeros(1, 2, 2, dtype=torch.long)
    assert consistency_loss(logits, target, torch.ones(1, 2, 2), nothing, 0.5).item() == 0


def test_dice_averages_the_classes_without_background():
    logits = torch.full((1, 3, 1, 2), -20.0)
    logits[0, 1, 0, 0] = 20
    logits[0, 2, 0, 1] = 20
    keep = torch.ones(1, 1, 2, dtype=torch.bool)
    assert dice_loss(logits, torch.tensor([[[1, 2]]]), keep).item() == pytest.approx(0, abs=1e-5)
    assert dice_loss(logits, torch.tensor([[[1, 1]]]), keep).item() == pytest.approx(
        1 - (2 / 3 + 0) / 2, abs=1e-4
    )


def test_equation_5_divides_confident_pixels_by_all_valid_ones():
    logits = logits_of([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [0.1, 0.9]])
    target = torch.tensor([[[0, 1, 1, 1]]])
    confidence = torch.tensor([[[0.99, 0.95, 0.5, 0.99]]])
    valid = torch.tensor([[[True, True, True, False]]])
    expected = -(math.log(0.5) + math.log(0.75)) / 3
    assert consistency_loss(logits, target, confidence, valid, 0.95).item() == pytest.approx(
        expected, rel=1e-5
    )


EQUATION_8 = {"vessa_threshold": 0.8, "conf_threshold": 0.95}


@pytest.fixture
def view():
    """Two pixels: the teacher is sure of the first (class 0), VESSA of the second (class 1)."""
    teacher = logits_of([[0.99, 0.01], [0.4, 0.6]]).softmax(1)
    vessa = (torch.tensor([[[1, 1]]]), torch.tensor([[[0.7, 0.9]]]))
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    return StrongView(logits_of([[0.5, 0.5], [0.2, 0.8]]), valid, teacher, vessa)


def test_the_teachers_hard_labels_are_equation_5(view):
    assert teacher_loss(view, "ce", 0.95).item() == pytest.approx(-math.log(0.5) / 2, rel=1e-5)
    assert teacher_loss(view, "ce", 0.5).item() == pytest.approx(
        -(math.log(0.5) + math.log(0.8)) / 2, rel=1e-5
    )


def test_the_teachers_soft_labels_count_on_every_valid_pixel(view):
    cross_entropy = -(math.log(0.5) + 0.4 * math.log(0.2) + 0.6 * math.log(0.8)) / 2
    dice = 1 - 2 * (0.5 * 0.01 + 0.8 * 0.6) / (0.5 + 0.8 + 0.01 + 0.6)
    expected = 0.5 * cross_entropy + 0.5 * dice
    assert teacher_loss(view, "soft", 0.95).item() == pytest.approx(expected, rel=1e-4)
    half = replace(view, valid=torch.tensor([[[False, True]]]))
    cross_entropy = -(0.4 * math.log(0.2) + 0.6 * math.log(0.8))
    dice = 1 - 2 * 0.8 * 0.6 / (0.8 + 0.6)
    assert teacher_loss(half, "soft", 0.95).item() == pytest.approx(
        0.5 * cross_entropy + 0.5 * dice, rel=1e-4
    )


def test_equation_8_with_vessas_own_gate(view):
    expected = -math.log(0.8) / 2  # VESSA is sure of the second pixel alone
    assert vessa_loss(view, "ce", gate="own", **EQUATION_8).item() == pytest.approx(expected, rel=1e-5)


def test_equation_8_as_printed_gates_vessa_by_the_teacher(view):
    expected = -math.log(0.5) / 2  # VESSA's label 1 on the teacher's first pixel
    assert vessa_loss(view, "ce", gate="teacher", **EQUATION_8).item() == pytest.approx(expected, rel=1e-5)


def test_vessas_labels_are_weighted_by_their_confidence(view):
    cross_entropy = -(0.7 * math.log(0.5) + 0.9 * math.log(0.8)) / (0.7 + 0.9)
    dice = 1 - 2 * (0.7 * 0.5 + 0.9 * 0.8) / (0.7 * 1.5 + 0.9 * 1.8)
    expected = 0.5 * cross_entropy + 0.5 * dice
    assert vessa_loss(view, "ce_dice", gate="own", **EQUATION_8).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["ce_dice", "ce", "dice"])
@pytest.mark.parametrize("gate", ["own", "teacher"])
def test_a_label_that_did_not_come_teaches_nothing(view, gate, kind):
    missing = replace(view, vessa=(torch.zeros(1, 1, 2, dtype=torch.long), torch.zeros(1, 1, 2)))
    loss = vessa_loss(missing, kind, gate=gate, vessa_threshold=0.0, conf_threshold=0.95)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_a_view_without_labels_of_vessa_is_refused(view):
    with pytest.raises(ValueError, match="no labels of VESSA"):
        vessa_loss(replace(view, vessa=None), "ce", gate="own", **EQUATION_8)


def test_gated_dice_inflates_a_structure_and_the_weighted_loss_does_not():
    """A structure of 4 px, a ring of 4 px that VESSA is unsure of, 8 px of sure background."""
    labels = torch.tensor([[[1] * 4 + [0] * 12]])
    confidence = torch.tensor([[[0.9] * 4 + [0.6] * 4 + [0.9] * 8]])
    valid = torch.ones(1, 1, 16, dtype=torch.bool)

    def loss(kind, foreground):
        logits = logits_of([[0.001, 0.999]] * foreground + [[0.999, 0.001]] * (16 - foreground))
        view = StrongView(logits, valid, logits.softmax(1), (labels, confidence))
        return vessa_loss(view, kind, gate="own", **EQUATION_8).item()

    assert loss("dice", 8) == pytest.approx(loss("dice", 4), abs=1e-3)  # twice the volume costs nothing
    assert loss("dice", 16) == pytest.approx(1 - 8 / 16, abs=1e-2)  # and all foreground costs one half
    assert loss("ce_dice", 8) > loss("ce_dice", 4) + 0.5


def test_gated_dice_does_not_see_foreground_where_there_is_no_structure():
    logits = torch.zeros(1, 2, 8, 8, requires_grad=True)
    labels, confidence = torch.zeros(1, 8, 8, dtype=torch.long), torch.ones(1, 8, 8)
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    view = StrongView(logits, valid, logits.softmax(1).detach(), (labels, confidence))
    pushes = [
        torch.autograd.grad(vessa_loss(view, kind, gate="own", **EQUATION_8), logits)[0].abs().sum().item()
        for kind in ("ce_dice", "dice")
    ]
    assert pushes[1] < 1e-5 * pushes[0]


def test_the_dice_of_confident_pixels_may_take_the_place_of_equation_5():
    logits = logits_of([[0.5, 0.5], [0.2, 0.8]])
    target, confidence = torch.tensor([[[1, 1]]]), torch.tensor([[[0.99, 0.5]]])
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    dice = 1 - 2 * 0.5 / (0.5 + 1)  # of the first pixel, which alone is confident
    assert consistency_loss(logits, target, confidence, valid, 0.95, "dice").item() == pytest.approx(
        dice, rel=1e-4
    )
    assert consistency_loss(logits, target, confidence * 0, valid, 0.95, "dice").item() == 0


def test_dice_is_not_drowned_by_confident_background():
    logits = torch.zeros(1, 2, 8, 8, requires_grad=True)
    target, confidence = torch.zeros(1, 8, 8, dtype=torch.long), torch.ones(1, 8, 8)
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    pushes = []
    for kind in ("ce", "dice"):
        loss = consistency_loss(logits, target, confidence, valid, 0.95, kind)
        pushes.append(torch.autograd.grad(loss, logits)[0].abs().sum().item())
    assert pushes[1] < 1e-5 * pushes[0]


def test_class_thresholds_let_the_same_share_of_each_class_pass():
    background = [[c, (1 - c) / 2, (1 - c) / 2] for c in (0.99, 0.98, 0.97, 0.6)]
    structure = [[0.1, c, 0.9 - c] for c in (0.8, 0.7, 0.6, 0.5)]
    probability = torch.tensor(background + structure).T[None, :, None, :]
    valid = torch.ones(1, 1, 8, dtype=torch.bool)
    # three of eight pixels reach 0.95, all of them background: a share of 3/8, 1.5 of four, rounded to two
    found = class_thresholds(probability, valid, 0.95)
    assert found.tolist() == pytest.approx([0.98, 0.7, 0.95])
    valid[..., 4:] = False  # the structure is padding: the share is 3/4, and its class keeps the threshold
    assert class_thresholds(probability, valid, 0.95).tolist() == pytest.approx([0.97, 0.95, 0.95])
    assert class_thresholds(probability, valid, 0.999)[0] == math.inf
    nothing = torch.zeros_like(valid)
    assert class_thresholds(probability, nothing, 0.95).tolist() == pytest.approx([0.95] * 3)


def test_a_threshold_for_each_class_gates_the_teachers_labels():
    teacher = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).T[None, :, None, :]
    view = StrongView(logits_of([[0.5, 0.5], [0.5, 0.5]]), torch.ones(1, 1, 2, dtype=torch.bool), teacher)
    for thresholds, kept in (((0.95, 0.6), 1), ((0.9, 0.6), 2), ((0.95, 0.8), 0)):
        loss = teacher_loss(view, "ce", torch.tensor(thresholds))
        assert loss.item() == pytest.approx(kept * math.log(2) / 2)
