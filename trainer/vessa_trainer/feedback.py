"""Teacher-to-VESSA feedback (paper section 3.2): what the teacher knows becomes prompts."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from vessa.annotation import box_and_point
from vessa.client import Prompts
from vessa_trainer.config import Config, FeedbackConfig

if TYPE_CHECKING:
    from vessa_trainer.loop import Run

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


class FeedbackRounds:
    """Sends the source's predictions on the plain images of the coming steps, every so many steps."""

    def __init__(self, config: Config) -> None:
        """Plan rounds from `feedback.start` on."""
        self.config = config
        self.first = int(config.feedback.start * config.steps)
        self.sent = 0
        self._round = -1

    def due(self, step: int) -> bool:
        """Whether a round begins before this step; after a resume also in the middle of a round."""
        return step >= self.first and self._number(step) != self._round

    def _number(self, step: int) -> int:
        return (step - self.first) // self.config.feedback.every

    def send_if_due(self, run: "Run") -> None:
        """Predict the images of the coming round and ask the annotator to look again."""
        from vessa_trainer.loop import predict_slice

        if not self.due(run.step) or run.unlabeled is None or run.unlabeled_order is None or run.feed is None:
            return
        self._round = self._number(run.step)
        end = min(self.first + (self._round + 1) * self.config.feedback.every, self.config.steps)
        coming = run.unlabeled_order.ahead(run.step, end - run.step)
        items = [run.unlabeled.slices[r] for r in dict.fromkeys(r for batch in coming for r in batch)]
        model = run.teacher if self.config.feedback.source == "teacher" else run.student
        for start in range(0, len(items), self.config.batch_eval):
            part = items[start : start + self.config.batch_eval]
            images = [run.dataset.image(s) for s in part]
            predicted = predict_slice(model, images, self.config, run.channels)
            prompts = [prompts_from(p, run.feed.class_ids, self.config.feedback) for p in predicted]
            run.feed.refresh([s.name for s in part], prompts)
        self.sent += len(items)
        run.student.train()
