"""The paper's equations against values worked by hand."""

import math

import pytest
import torch

from vessa_trainer.semi_supervised.losses import consistency_loss, dice_loss, joint_loss, supervised_loss


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


@pytest.fixture
def two_views():
    strong = (logits_of([[0.5, 0.5], [0.2, 0.8]]), logits_of([[0.4, 0.6], [0.9, 0.1]]))
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    teacher = (torch.tensor([[[0, 1]]]), torch.tensor([[[0.99, 0.6]]]))
    vessa = (torch.tensor([[[1, 1]]]), torch.tensor([[[0.7, 0.9]]]))
    return strong, (teacher, teacher), (vessa, vessa), (valid, valid)


def test_equation_8_with_vessas_own_gate(two_views):
    strong, teacher, vessa, valid = two_views
    joint, teacher_term, vessa_term = joint_loss(
        strong, teacher, vessa, valid, alpha_t=0.25, alpha_v=0.75,
        conf_threshold=0.95, vessa_threshold=0.8, gate="own",
    )  # fmt: skip
    by_teacher = -(math.log(0.5) / 2 + math.log(0.4) / 2) / 2  # its first pixel alone is confident
    by_vessa = -(math.log(0.8) / 2 + math.log(0.1) / 2) / 2  # its second alone is
    assert teacher_term.item() == pytest.approx(by_teacher, rel=1e-5)
    assert vessa_term.item() == pytest.approx(by_vessa, rel=1e-5)
    assert joint.item() == pytest.approx(0.25 * by_teacher + 0.75 * by_vessa, rel=1e-5)


def test_equation_8_as_printed_gates_vessa_by_the_teacher(two_views):
    strong, teacher, vessa, valid = two_views
    _, _, vessa_term = joint_loss(
        strong, teacher, vessa, valid, alpha_t=0.5, alpha_v=0.5,
        conf_threshold=0.95, vessa_threshold=0.8, gate="teacher",
    )  # fmt: skip
    expected = -(math.log(0.5) / 2 + math.log(0.6) / 2) / 2  # VESSA's label 1 on the teacher's first pixel
    assert vessa_term.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gate", ["own", "teacher"])
def test_a_label_that_did_not_come_teaches_nothing(two_views, gate):
    strong, teacher, _, valid = two_views
    missing = (torch.zeros(1, 1, 2, dtype=torch.long), torch.zeros(1, 1, 2))
    _, _, vessa_term = joint_loss(
        strong, teacher, (missing, missing), valid, alpha_t=0.5, alpha_v=0.5,
        conf_threshold=0.95, vessa_threshold=0.0, gate=gate,
    )  # fmt: skip
    assert vessa_term.item() == 0


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
