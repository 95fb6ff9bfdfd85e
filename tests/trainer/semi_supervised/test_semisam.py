"""The SemiSAM+-style terms against values worked by hand."""

import pytest
import torch

from vessa_trainer.config import load_config
from vessa_trainer.semi_supervised.batches import UnlabeledViews
from vessa_trainer.semi_supervised.schedule import ramp
from vessa_trainer.semi_supervised.semisam import drawn_dice, mean_square, unlabeled_term
from vessa_trainer.students.networks import UNet


def test_mean_square_is_over_valid_pixels():
    ours = torch.tensor([[[[0.5, 1.0]], [[0.5, 0.0]]]])
    taught = torch.tensor([[[[0.0, 0.0]], [[1.0, 1.0]]]])
    assert mean_square(ours, taught, torch.tensor([[[True, False]]])).item() == pytest.approx(0.25)
    assert mean_square(ours, taught, torch.zeros(1, 1, 2, dtype=torch.bool)).item() == 0


def test_only_what_was_drawn_teaches():
    probability = torch.full((1, 3, 1, 4), 0.5)
    labels = torch.tensor([[[1, 1, 0, 0]]])
    keep = torch.ones(1, 1, 4, dtype=torch.bool)
    # Class 1: 2 * (0.5 + 0.5) / (4 * 0.5 + 2); class 2 was not drawn.
    assert drawn_dice(probability, labels, keep).item() == pytest.approx(1 - 2 / 4, abs=1e-5)
    keep[..., 1] = False
    assert drawn_dice(probability, labels, keep).item() == pytest.approx(1 - 1 / 2.5, abs=1e-5)
    assert drawn_dice(probability, torch.zeros_like(labels), keep).item() == 0


def test_the_drawn_masks_have_a_gradient():
    logits = torch.zeros(1, 2, 1, 4, requires_grad=True)
    keep = torch.ones(1, 1, 4, dtype=torch.bool)
    drawn_dice(logits.softmax(1), torch.tensor([[[1, 1, 0, 0]]]), keep).backward()
    assert (logits.grad[0, 1, 0, :2] < 0).all()  # up where SAM drew
    assert (logits.grad[0, 1, 0, 2:] > 0).all()


def test_the_teacher_rises_as_sam_falls():
    torch.manual_seed(0)
    net = UNet(1, 3, (4, 8)).eval()
    views = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    drawn = (torch.ones(2, 4, 4, dtype=torch.int64), torch.ones(2, 4, 4))
    unlabeled = UnlabeledViews(views, (views + 1, views), (nothing, nothing), ~nothing, drawn)
    config = load_config(None, ["semi.method=semisam", "steps=10"])
    for step in (0, 5, 10):
        term, parts = unlabeled_term(net, net, unlabeled, config, step)
        by_hand = ramp(step, 10) * parts["loss_teacher"] + ramp(10 - step, 10) * parts["loss_vessa"]
        assert term.item() == pytest.approx(by_hand, rel=1e-5)
        assert parts["loss_teacher"] > 0
        assert parts["loss_vessa"] > 0
