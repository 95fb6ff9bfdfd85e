"""Compare the losses of Stage 1 with values worked by hand."""

import math

import pytest
import torch

from vessa_server.pretraining.losses import (
    LossWeights,
    iou_loss,
    mask_loss,
    presence_loss,
    retrieval_loss,
    soft_dice,
    whereabouts_loss,
)


def test_mask_loss_is_equation_3():
    logits = torch.tensor([[[[0.0, math.log(3)]]]])  # probabilities 0.5 and 0.75
    target = torch.tensor([[[[0.0, 1.0]]]])
    bce = -(math.log(0.5) + math.log(0.75)) / 2
    dice = 1 - (2 * 0.75 + 1) / (1.25 + 1 + 1)
    expected = 2 * bce + 0.5 * dice
    assert mask_loss(logits, target, LossWeights()).item() == pytest.approx(expected, rel=1e-5)


def test_dice_of_a_perfect_and_of_a_missed_mask():
    target = torch.ones(1, 1, 4, 4)
    assert soft_dice(torch.full((1, 1, 4, 4), 30.0), target).item() == pytest.approx(1)
    assert soft_dice(torch.full((1, 1, 4, 4), -30.0), target, 1e-6).item() == pytest.approx(0, abs=1e-6)


def test_iou_is_taught_on_present_masks_only():
    logits = torch.tensor([[[[5.0, -5.0]]], [[[5.0, -5.0]]]])
    target = torch.tensor([[[[1.0, 1.0]]], [[[0.0, 0.0]]]])  # IoU 0.5; absent
    assert iou_loss(torch.tensor([0.75, 0.9]), logits, target).item() == pytest.approx(0.25**2)
    assert iou_loss(torch.tensor([0.9]), logits[1:], target[1:]).item() == 0
    assert presence_loss(torch.zeros(2), target).item() == pytest.approx(math.log(2))
    assert presence_loss(torch.tensor([30.0, -30.0]), target).item() == pytest.approx(0, abs=1e-6)


def test_retrieval_loss_prefers_the_same_layout():
    layouts = torch.tensor([[0.1, 0.3], [0.1, 0.3], [0.4, 0.0], [0.4, 0.0]])
    kinds = torch.zeros(4, dtype=torch.int64)
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    alike = retrieval_loss(torch.stack([one, one, other, other]), layouts, kinds)
    mixed = retrieval_loss(torch.stack([one, other, one, other]), layouts, kinds)
    assert alike < 0.01 < 1 < mixed
    apart = torch.tensor([0, 0, 1, 1])  # of two kinds: what looks alike across them counts against
    assert retrieval_loss(torch.stack([one] * 4), layouts, apart) == pytest.approx(math.log(3))


def test_whereabouts_are_the_share_of_each_cell():
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2, :2] = 1
    sure = torch.tensor([[30.0, -30.0, -30.0, -30.0]])
    assert whereabouts_loss(sure, target).item() == pytest.approx(0, abs=1e-6)
    assert whereabouts_loss(torch.zeros(1, 4), target).item() == pytest.approx(math.log(2))
