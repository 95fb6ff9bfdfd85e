"""Compute the loss of Stage 1 (Eq. 2 and 3)."""

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
    whereabouts: float = 1.0


def soft_dice(logits: Tensor, target: Tensor, epsilon: float = 1.0) -> Tensor:
    """Return the Dice of each mask.

    logits: (N, 1, h, w); target: (N, 1, h, w) in [0, 1]. Returns (N,) in [0, 1].
    """
    probability = logits.sigmoid()
    overlap = (probability * target).sum((1, 2, 3))
    return (2 * overlap + epsilon) / (probability.sum((1, 2, 3)) + target.sum((1, 2, 3)) + epsilon)


def mask_loss(logits: Tensor, target: Tensor, weights: LossWeights) -> Tensor:
    """Return Eq. 3 with BCE on logits and Dice on sigmoids, where the paper writes probabilities."""
    bce = F.binary_cross_entropy_with_logits(logits, target)
    return weights.bce * bce + weights.dice * (1 - soft_dice(logits, target)).mean()


def shown(target: Tensor) -> Tensor:
    """Return which masks (N, 1, h, w) in [0, 1] are not empty: (N,) bool."""
    return (target > 0.5).flatten(1).any(1)


def iou_loss(iou: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Regress the predicted IoU to the actual one; a mean over the masks that are present.

    iou: (N,) in [0, 1]; logits, target: (N, 1, h, w)
    """
    drawn, true, there = logits.detach() > 0, target > 0.5, shown(target)
    union = (drawn | true).flatten(1).sum(1)
    actual = (drawn & true).flatten(1).sum(1) / union.clamp(min=1)
    return F.mse_loss(iou[there], actual[there]) if there.any() else iou.sum() * 0


def presence_loss(presence: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of the presence score. presence: (N,) logits."""
    return F.binary_cross_entropy_with_logits(presence, shown(target).float())


def retrieval_loss(vectors: Tensor, layouts: Tensor, kinds: Tensor, temperature: float = 0.1) -> Tensor:
    """Rank templates by layout: cross-entropy between similarity of features and of layouts.

    vectors: (B, D) unit vectors; layouts: (B, K) root of each class's share of the image; kinds: (B,)
    int, images of different kinds are never alike; temperature: that of Eq. 1
    Only nano's retriever is trained; DINOv2 stays as published.
    """
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    distance = torch.cdist(layouts, layouts)
    related = (kinds[:, None] == kinds) & ~itself
    width = 0.15 * distance[related].mean().clamp(min=1e-4)
    alike = (-distance / width).masked_fill(~related, -torch.inf).softmax(1)
    log_found = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    return -(alike * log_found.masked_fill(itself, 0)).sum(1).mean()


def whereabouts_loss(maps: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of the coarse maps that are read from the states at <SEG>.

    maps: (N, c * c) logits; target: (N, 1, h, w) in [0, 1]
    """
    cells = round(maps.shape[1] ** 0.5)
    coarse = F.adaptive_avg_pool2d(target, cells).flatten(1)
    return F.binary_cross_entropy_with_logits(maps, coarse)
