"""Schedules of a run: shares of teacher and VESSA, learning rate, decay of the EMA teacher."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def eta(step: int, total: int) -> float:
    """Return the teacher's weight eta, a cosine ramp from 0 to 1 over the run (below Eq. 8)."""
    return (1 - math.cos(math.pi * min(max(step / total, 0.0), 1.0))) / 2


def source_weights(step: int, total: int, alpha_v_floor: float = 0.0) -> tuple[float, float]:
    """Return (alpha_t, alpha_v), the shares of the teacher and of VESSA in the unlabeled loss.

    They are eta and 1 - eta, the latter never below the floor, divided by their sum: the unlabeled loss
    keeps its weight against the labeled one over the whole run. Floor 0 is Eq. 9 of the paper, floor 1 ends
    with equal shares.
    """
    teacher = eta(step, total)
    vessa = max(1 - teacher, alpha_v_floor)
    return teacher / (teacher + vessa), vessa / (teacher + vessa)


def ramp(step: int, total: int) -> float:
    """Rise from exp(-5) to 1 over the run, exp(-5 (1 - t/T)^2) (Laine and Aila, mean teacher)."""
    return math.exp(-5 * (1 - min(max(step / total, 0.0), 1.0)) ** 2)


def poly(step: int, total: int, power: float = 0.9) -> float:
    """Factor of the learning rate after `step` of `total` iterations (UniMatch V2)."""
    return max(1 - step / total, 0.0) ** power


def ema_decay(step: int, limit: float = 0.996) -> float:
    """Decay of the teacher's average after `step` iterations: short at first, then `limit`."""
    return min(1 - 1 / (step + 1), limit)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the teacher's parameters and buffers towards the student's (theta_t below Eq. 6).

    Counters (integer buffers) are copied: an average of them means nothing.
    """
    pairs = list(zip(_state(teacher), _state(student), strict=True))
    floats = [(t, s) for t, s in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floats], [s for _, s in floats], 1 - decay)
    for theirs, ours in pairs:
        if not theirs.is_floating_point():
            theirs.copy_(ours)


def _state(module: nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
