"""Train with a mean teacher and a promptable SAM, after SemiSAM and SemiSAM+ (Zhang et al.).

The student's predictions become prompts, a SAM draws masks from them, and on unlabeled images the student
is matched to its mean teacher and to SAM. The teacher's weight rises over the run, SAM's weight falls.

Published code that we do not follow: it divides the SAM term by itself, which leaves no gradient; it draws
prompts from the background channel, and in its first version from the truth.
"""

import torch
from torch import Tensor, nn

from vessa_trainer.config import Config
from vessa_trainer.data import augmentation
from vessa_trainer.semi_supervised.batches import UnlabeledViews
from vessa_trainer.semi_supervised.distributed import ALONE, Processes
from vessa_trainer.semi_supervised.schedule import ramp
from vessa_trainer.students.networks import logits_of


def unlabeled_term(
    student: nn.Module,
    teacher: nn.Module,
    unlabeled: UnlabeledViews,
    config: Config,
    step: int,
    processes: Processes = ALONE,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of unlabeled images, a scalar, and its parts.

    The student sees the first strong view, the teacher the weak one. unlabeled.vessa: what SAM drew.
    """
    assert unlabeled.vessa is not None
    gather = processes.gather
    box = unlabeled.boxes[0]
    with torch.no_grad():
        taught = logits_of(teacher, unlabeled.weak, bf16=config.bf16).softmax(1)
    probability = gather(logits_of(student, unlabeled.strong[0], bf16=config.bf16).softmax(1))
    valid = gather(augmentation.paste(unlabeled.valid, box))
    consistency = mean_square(probability, gather(augmentation.paste(taught, box)), valid)
    labels, confidence = (gather(augmentation.paste(t, box)) for t in unlabeled.vessa)
    drawn = drawn_dice(probability, labels, valid & (confidence >= config.semi.vessa_threshold))
    rises, falls = ramp(step, config.steps), ramp(config.steps - step, config.steps)
    figures = {"loss_teacher": consistency.item(), "loss_vessa": drawn.item(), "eta": rises}
    return rises * consistency + falls * drawn, figures


def mean_square(probability: Tensor, taught: Tensor, valid: Tensor) -> Tensor:
    """Average the squared difference of two (B, C, H, W) over classes and valid (B, H, W) pixels."""
    per_pixel = (probability - taught).square().mean(1)
    return (per_pixel * valid).sum() / valid.sum().clamp(min=1)


def drawn_dice(probability: Tensor, labels: Tensor, keep: Tensor, epsilon: float = 1e-5) -> Tensor:
    """One minus Dice, averaged over the structures that were drawn; 0 when none was.

    probability: (B, C, H, W); labels: (B, H, W) int64 class ids; keep: (B, H, W) bool
    SAM is prompted with the student's predictions: a class without a mask may not have been prompted, so it
    has no loss. A mean over pixels, as for the teacher, would neglect small structures.
    """
    classes = torch.arange(1, probability.shape[1], device=labels.device)
    mask = ((labels[:, None] == classes[:, None, None]) & keep[:, None]).float()
    ours = probability[:, 1:] * keep[:, None]
    overlap, total = (ours * mask).sum((2, 3)), (ours + mask).sum((2, 3))
    there = (mask.sum((2, 3)) > 0).float()
    loss = 1 - (2 * overlap + epsilon) / (total + epsilon)
    return (loss * there).sum() / there.sum().clamp(min=1)
