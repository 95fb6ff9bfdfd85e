"""Schedules and the teacher's average."""

import copy

import pytest
import torch
from torch import nn

from vessa_trainer.semi_supervised.schedule import ema_decay, eta, poly, ramp, source_weights, update_teacher


def test_eta_ramps_from_zero_to_one():
    assert [eta(t, 100) for t in (0, 50, 100, 150)] == pytest.approx([0, 0.5, 1, 1])
    assert eta(25, 100) == pytest.approx(0.1464466)


def test_vessa_hands_over_to_the_teacher():
    assert source_weights(0, 10) == pytest.approx((0, 1))
    assert source_weights(10, 10) == pytest.approx((1, 0))
    assert source_weights(10, 10, 0.25) == pytest.approx((0.8, 0.2))
    assert source_weights(10, 10, 1) == pytest.approx((0.5, 0.5))
    assert sum(source_weights(6, 10, 1)) == pytest.approx(1)


def test_ramp_rises_from_almost_nothing_to_one():
    assert [ramp(t, 10) for t in (-1, 0, 5, 10, 20)] == pytest.approx(
        [0.006737947, 0.006737947, 0.2865048, 1, 1]
    )


def test_poly_decay():
    assert poly(0, 100) == 1
    assert poly(50, 100) == pytest.approx(0.5**0.9)
    assert poly(100, 100) == poly(120, 100) == 0


def test_the_teacher_follows_quickly_at_first():
    assert ema_decay(0) == 0
    assert ema_decay(1) == 0.5
    assert ema_decay(10_000) == 0.996


def test_the_average_covers_parameters_and_buffers():
    student = nn.BatchNorm1d(2)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        student.weight.fill_(3.0)
        student.running_mean.fill_(1.0)
        student.num_batches_tracked.fill_(7)
    update_teacher(teacher, student, 0.75)
    assert teacher.weight.tolist() == pytest.approx([1.5, 1.5])
    assert teacher.running_mean.tolist() == pytest.approx([0.25, 0.25])
    assert teacher.num_batches_tracked.item() == 7
