"""The losses of the paper's section 3.2, and the weighted loss that replaces Eq. 8 by default.

Equation numbers are the paper's. Every function returns a scalar.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_loss(
    logits: Tensor, target: Tensor, weight: Tensor, lambda_ce: float = 0.5, lambda_dice: float = 0.5
) -> Tensor:
    """Add cross-entropy and Dice over all weighted pixels (Eq. 4).

    logits: (B, C, H, W) float, student, unnormalised
    target: (B, H, W) int64 class ids, or (B, C, H, W) float class probabilities (soft target)
    weight: (B, H, W) bool or float >= 0, 0 on padding and on pixels without a label
    Dice is averaged over the classes, background left out.
    """
    per_pixel = F.cross_entropy(logits, target, reduction="none")
    cross_entropy = (per_pixel * weight).sum() / weight.sum().clamp(min=1)
    return lambda_ce * cross_entropy + lambda_dice * dice_loss(logits, target, weight)


def dice_loss(logits: Tensor, target: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Compute one minus the Dice of softmax probabilities, summed over the batch as in Eq. 4.

    logits: (B, C, H, W); target: (B, H, W) int64 or (B, C, H, W) float; weight: (B, H, W) bool or float.
    Classes 1..C-1 count alike.
    """
    if target.ndim == 3:
        target = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2)
    weight = weight[:, None].to(logits.dtype)
    probability, truth = logits.softmax(1)[:, 1:], target[:, 1:]
    overlap = (probability * truth * weight).sum((0, 2, 3))
    total = ((probability + truth) * weight).sum((0, 2, 3))
    return 1 - ((2 * overlap + epsilon) / (total + epsilon)).mean()


def consistency_loss(
    logits: Tensor,
    target: Tensor,
    confidence: Tensor,
    valid: Tensor,
    threshold: float | Tensor,
    kind: str = "ce",
) -> Tensor:
    """Match one strong view to hard pseudo-labels where these are confident (Eq. 5).

    logits: (B, C, H, W) float, student, unnormalised
    target: (B, H, W) int64 class ids; confidence: (B, H, W) float in [0, 1]
    valid: (B, H, W) bool, False on padding
    threshold: in [0, 1], or one of each pixel, (B, H, W)
    kind: "ce" as in Eq. 5, or "dice", UniMatch v1's recipe for medical images: Dice of the confident pixels,
    to which a batch that is background everywhere gives no gradient
    As in UniMatch V2 the sum over confident pixels is divided by all valid pixels, so that few confident
    pixels make a small loss; without valid pixels it is 0.

    Gated Dice inflates structures. A pixel outside the gate costs nothing, and the uncertain pixels lie
    around the structure: predicting them as foreground is free. A batch without the structure costs nothing
    either, whatever is predicted there. `supervised_loss` with pixel weights has neither gap.
    """
    keep = valid & (confidence >= threshold)
    if kind == "dice":
        return dice_loss(logits, target, keep)
    per_pixel = F.cross_entropy(logits, target, reduction="none")
    return (per_pixel * keep).sum() / valid.sum().clamp(min=1)


@dataclass(frozen=True)
class StrongView:
    """One strong view of the unlabeled images with its targets, CutMix already pasted.

    logits: (B, C, H, W) float, student; valid: (B, H, W) bool, False on padding
    teacher: (B, C, H, W) float, class probabilities of the EMA teacher
    vessa: labels (B, H, W) int64 and confidence (B, H, W) float in [0, 1], or None without an annotator.
    Confidence 0 means that a pixel has no label: the label is late or failed, or cleaning removed it.
    """

    logits: Tensor
    valid: Tensor
    teacher: Tensor
    vessa: tuple[Tensor, Tensor] | None = None


def class_thresholds(probability: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return a threshold for each class, (C,), by which the same share of every predicted class passes.

    probability: (B, C, H, W) float of the teacher; valid: (B, H, W) bool
    threshold: in [0, 1]; the share is that of all valid pixels whose confidence reaches it. A class that
    nothing is given to keeps it; a class of which no pixel passes gets infinity
    """
    confidence, labels = probability.max(1)
    share = ((confidence >= threshold) & valid).sum() / valid.sum().clamp(min=1)
    found = torch.full((probability.shape[1],), threshold, device=probability.device)
    for class_id in range(len(found)):
        values = confidence[valid & (labels == class_id)]
        if len(values):
            passing = int((share * len(values)).round())
            found[class_id] = values.topk(passing).values[-1] if passing else torch.inf
    return found


def teacher_loss(view: StrongView, kind: str, threshold: float | Tensor) -> Tensor:
    """Match a strong view to the EMA teacher.

    kind: "soft", cross-entropy and Dice against the teacher's probabilities on all valid pixels; "ce" or
    "dice", hard labels where the teacher's confidence reaches `threshold` (see `consistency_loss`), which may
    be one for each class, (C,)
    """
    if kind == "soft":
        return supervised_loss(view.logits, view.teacher, view.valid)
    confidence, labels = view.teacher.max(1)
    if isinstance(threshold, Tensor):
        threshold = threshold[labels]
    return consistency_loss(view.logits, labels, confidence, view.valid, threshold, kind)


def vessa_loss(
    view: StrongView, kind: str, *, gate: str, vessa_threshold: float, conf_threshold: float
) -> Tensor:
    """Match a strong view to VESSA's labels.

    kind: "ce_dice", cross-entropy and Dice on all valid pixels, each weighted by VESSA's confidence; "ce"
    or "dice", the gated losses of Eq. 8. gate: of these, "own" keeps the pixels where VESSA's confidence
    reaches `vessa_threshold`; "teacher" keeps those where the teacher's reaches `conf_threshold`, as Eq. 8
    is printed
    """
    if view.vessa is None:
        raise ValueError("this view has no labels of VESSA")
    labels, confidence = view.vessa
    if kind == "ce_dice":
        return supervised_loss(view.logits, labels, view.valid * confidence)
    gated, threshold = confidence, vessa_threshold
    if gate == "teacher":
        gated, threshold = view.teacher.amax(1), conf_threshold
    gated = torch.where(confidence > 0, gated, -1.0)  # a pixel without a label passes no gate
    return consistency_loss(view.logits, labels, gated, view.valid, threshold, kind)
