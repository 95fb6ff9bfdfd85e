"""The loss of Stage 1 (Eq. 2 and 3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms; text, bce and dice are those of Eq. 2 and 3."""

    text: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    quality: float = 0.1
    retrieval: float = 0.2


def soft_dice(logits: Tensor, target: Tensor, epsilon: float = 1.0) -> Tensor:
    """Dice of each mask.

    logits: (N, 1, h, w); target: (N, 1, h, w) in [0, 1]. Returns (N,) in [0, 1].
    """
    probability = logits.sigmoid()
    overlap = (probability * target).sum((1, 2, 3))
    return (2 * overlap + epsilon) / (probability.sum((1, 2, 3)) + target.sum((1, 2, 3)) + epsilon)


def mask_loss(logits: Tensor, target: Tensor, weights: LossWeights) -> Tensor:
    """Eq. 3 with logits where the paper writes probabilities: BCE on logits and Dice on sigmoids."""
    bce = F.binary_cross_entropy_with_logits(logits, target)
    return weights.bce * bce + weights.dice * (1 - soft_dice(logits, target)).mean()


def quality_loss(iou: Tensor, presence: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Teach the predicted IoU and the presence score what the mask was worth.

    iou: (N,) in [0, 1]; presence: (N,) logits; logits, target: (N, 1, h, w)
    """
    drawn, true = logits.detach() > 0, target > 0.5
    union = (drawn | true).flatten(1).sum(1)
    actual = (drawn & true).flatten(1).sum(1) / union.clamp(min=1)
    there = true.flatten(1).any(1).float()
    score = F.mse_loss(iou[there > 0], actual[there > 0]) if there.any() else iou.sum() * 0
    return score + F.binary_cross_entropy_with_logits(presence, there)


def retrieval_loss(one: Tensor, other: Tensor, temperature: float = 0.2) -> Tensor:
    """InfoNCE between two augmented views of the same images.

    one, other: (B, D) unit vectors. Only nano's retriever is taught; DINOv2's is kept as published.
    """
    similarity = one @ other.T / temperature
    same = torch.arange(one.shape[0], device=one.device)
    return (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
