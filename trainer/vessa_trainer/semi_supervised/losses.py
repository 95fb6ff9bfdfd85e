"""The losses of the paper's section 3.2; equation numbers are its own."""

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_loss(
    logits: Tensor, target: Tensor, valid: Tensor, lambda_ce: float = 0.5, lambda_dice: float = 0.5
) -> Tensor:
    """Cross-entropy plus Dice on labeled images (Eq. 4).

    logits: (B, C, H, W) float; target: (B, H, W) int64 class ids; valid: (B, H, W) bool, False on padding
    Returns a scalar. Dice is averaged over the classes, background left out.
    """
    per_pixel = F.cross_entropy(logits, target, reduction="none")
    cross_entropy = (per_pixel * valid).sum() / valid.sum().clamp(min=1)
    return lambda_ce * cross_entropy + lambda_dice * dice_loss(logits, target, valid)


def dice_loss(logits: Tensor, target: Tensor, keep: Tensor, epsilon: float = 1e-5) -> Tensor:
    """One minus the Dice of softmax probabilities, summed over the batch as in Eq. 4.

    logits: (B, C, H, W); target: (B, H, W) int64; keep: (B, H, W) bool. Classes 1..C-1 count alike.
    """
    weight = keep[:, None].float()
    probability = logits.softmax(1)[:, 1:] * weight
    truth = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2)[:, 1:] * weight
    overlap = (probability * truth).sum((0, 2, 3))
    total = (probability + truth).sum((0, 2, 3))
    return 1 - ((2 * overlap + epsilon) / (total + epsilon)).mean()


def consistency_loss(
    logits: Tensor,
    target: Tensor,
    confidence: Tensor,
    valid: Tensor,
    threshold: float,
    kind: str = "ce",
) -> Tensor:
    """Match one strong view to hard pseudo-labels (Eq. 5).

    logits: (B, C, H, W) float, student, unnormalised
    target: (B, H, W) int64 class ids; confidence: (B, H, W) float in [0, 1]
    valid: (B, H, W) bool, False on padding
    kind: "ce" as in Eq. 5, or "dice", UniMatch v1's recipe for medical images: Dice of the confident pixels,
    to which a batch that is background everywhere gives no gradient
    Returns a scalar. As in UniMatch V2 the sum over confident pixels is divided by all valid
    pixels, so that few confident pixels make a small loss; without valid pixels it is 0.
    """
    keep = valid & (confidence >= threshold)
    if kind == "dice":
        return dice_loss(logits, target, keep)
    per_pixel = F.cross_entropy(logits, target, reduction="none")
    return (per_pixel * keep).sum() / valid.sum().clamp(min=1)


def joint_loss(
    strong: tuple[Tensor, Tensor],
    teacher: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    vessa: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    valid: tuple[Tensor, Tensor],
    *,
    alpha_t: float,
    alpha_v: float,
    conf_threshold: float,
    vessa_threshold: float,
    gate: str,
    kind: str = "ce",
) -> tuple[Tensor, Tensor, Tensor]:
    """Teach both strong views by the EMA teacher and by VESSA (Eq. 7 and 8).

    strong: logits (B, C, H, W) of each view; teacher, vessa: for each view its (labels, confidence)
    as (B, H, W) int64 and float, CutMix already pasted; valid: (B, H, W) bool of each view
    gate: "teacher" keeps VESSA's pixels where the teacher is confident, as Eq. 8 is printed; "own"
    where VESSA itself is
    Returns (joint, teacher's term, VESSA's term), the terms before alpha.
    """
    teacher_term = strong[0].new_zeros(())
    vessa_term = strong[0].new_zeros(())
    for view in range(2):
        labels, confidence = teacher[view]
        teacher_term = teacher_term + consistency_loss(
            strong[view], labels, confidence, valid[view], conf_threshold, kind
        )
        vessa_labels, vessa_confidence = vessa[view]
        gated, threshold = (
            (confidence, conf_threshold) if gate == "teacher" else (vessa_confidence, vessa_threshold)
        )
        # Confidence 0 means that there is no label (not come yet, or failed): no gate lets it pass.
        gated = torch.where(vessa_confidence > 0, gated, -1.0)
        vessa_term = vessa_term + consistency_loss(
            strong[view], vessa_labels, gated, valid[view], threshold, kind
        )
    teacher_term, vessa_term = teacher_term / 2, vessa_term / 2
    return alpha_t * teacher_term + alpha_v * vessa_term, teacher_term, vessa_term
