"""Turn class probabilities of the teacher into prompts."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from vessa.client import Prompts
from vessa.masks.geometry import box_and_point
from vessa_trainer.config import FeedbackConfig

_SIDE = 64  # px, longest side of the mask logits sent: the annotator resizes them to its own grid

_LIMIT = 6.0  # logits beyond it say nothing more

_MIN_SHARE = 0.0002  # of the image; a smaller component is no structure


def prompts_from(probabilities: Tensor, class_ids: list[int], config: FeedbackConfig) -> Prompts:
    """Turn one image's class probabilities into prompts for K classes.

    probabilities: (C, H, W) float in [0, 1] over class ids, background first; class_ids: the K
    classes in the order of the bank. A class gets prompts only where some component of it is
    confident (mean probability): its box is that of the largest such component, its point the
    deepest pixel there, its mask logits are its log-odds against the rest, clipped to [-6, 6], on a
    grid of at most 64x64. A class without such a component has box -1, point label -1, mask_present 0.
    """
    height, width = probabilities.shape[-2:]
    winner = probabilities.argmax(0)
    boxes = np.full((len(class_ids), 4), -1, np.float32)
    points = np.zeros((len(class_ids), 1, 2), np.float32)
    point_labels = np.full((len(class_ids), 1), -1, np.int8)
    present = np.zeros(len(class_ids), np.uint8)
    logits = torch.logit(probabilities[class_ids], eps=1e-4).clamp(-_LIMIT, _LIMIT)
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(logits[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    for index, class_id in enumerate(class_ids):
        component = _largest(
            (winner == class_id).numpy(), probabilities[class_id].numpy(), config.min_confidence
        )
        if component is None:
            continue
        boxes[index], points[index, 0] = box_and_point(component)
        point_labels[index, 0] = present[index] = 1
    chosen = set(config.prompts)
    return Prompts(
        boxes=boxes if "boxes" in chosen else None,
        points=points if "points" in chosen else None,
        point_labels=point_labels if "points" in chosen else None,
        mask_logits=small.numpy().astype(np.float16) if "mask_logits" in chosen else None,
        mask_present=present if "mask_logits" in chosen else None,
    )


def _largest(mask: np.ndarray, probability: np.ndarray, min_confidence: float) -> np.ndarray | None:
    """Return the largest component, bool (H, W), whose mean probability is confident, or None."""
    labeled, count = ndimage.label(mask)
    ids = np.arange(1, count + 1)
    areas = ndimage.sum_labels(mask, labeled, ids)
    sure = ndimage.mean(probability, labeled, ids) if count else np.zeros(0)
    good = (areas >= _MIN_SHARE * mask.size) & (np.asarray(sure) >= min_confidence)
    if not good.any():
        return None
    return labeled == ids[good][areas[good].argmax()]
