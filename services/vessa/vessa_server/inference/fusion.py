"""Fuse the masks of all classes into one label map: p_v = softmax over [0, z_1 .. z_K] (Sec. 3.2, p_v).

Beyond the paper, the bank's calibration leaves out a class that no prompt asserts and whose highest
probability is too low, and the islands of a class that has one piece.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vessa.schemas import TemplateUse
from vessa_server.inference.calibration import islands
from vessa_server.inference.query import ClassQuery, Query
from vessa_server.types import SegmentResult

_ABSENT = -20.0  # mask logit of a class where it is left out


def fuse(query: Query, classes: Sequence[ClassQuery], masks: Sequence[tuple[Tensor, float]]) -> SegmentResult:
    """Fuse the classes' mask logits on the image's own grid; the background has logit 0.

    masks: logits (1, 1, h, w) and predicted IoU of each class
    Pixels outside the zoomed view are background with full confidence. Pixels that lost their class by the
    calibration have confidence 0, as after cleaning: nothing is known of them.
    """
    item, square = query.item, query.view.square
    size, adaptation = query.whole.image.shape[:2], query.bank.adaptation
    logits = square.leave(torch.cat([mask for mask, _ in masks], dim=1))[0]  # (K, h, w)
    probability = _softmax(logits)
    predicted = probability.argmax(0)
    highest = probability[1:].flatten(1).amax(1).tolist()
    threshold = query.calibration.absence
    absent = [k for k, c in enumerate(classes) if highest[k] < threshold and not c.prompts.assert_presence]
    if absent:
        logits[absent] = _ABSENT
        probability = _softmax(logits)
    removed = _islands(query, classes, probability.argmax(0).cpu().numpy())
    if removed:
        for k, pixels in removed.items():
            logits[k][torch.from_numpy(pixels).to(logits.device)] = _ABSENT
        probability = _softmax(logits)
    confidence, winner = probability.max(0)
    confidence = confidence.masked_fill(winner != predicted, 0.0)
    ids = np.array([0] + [c.class_id for c in classes], np.uint8)
    labels, confidences = np.zeros(size, np.uint8), np.full(size, 255, np.uint8)
    labels[square.seen] = ids[winner.cpu().numpy()]
    confidences[square.seen] = (confidence * 255).round().byte().cpu().numpy()
    probabilities = None
    if item.probabilities:
        probabilities = np.zeros((len(ids), *size), np.float16)
        probabilities[0] = 1
        probabilities[:, *square.seen] = probability.half().cpu().numpy()
    return SegmentResult(
        image_id=item.image_id,
        labels=labels,
        confidence=confidences,
        probabilities=probabilities,
        class_ids=tuple(c.class_id for c in classes),
        class_names=tuple(c.class_name for c in classes),
        scores={c.class_name: round(score, 4) for c, (_, score) in zip(classes, masks, strict=True)},
        templates={
            c.class_name: [TemplateUse(id=t.id, group=t.group, similarity=round(s, 4)) for t, s in c.matches]
            for c in classes
        },
        bank_version=query.bank.version,
        bank_digest=query.bank.digest,
        adaptation=None if adaptation is None else adaptation.digest,
        absence_threshold=threshold,
        absent=tuple(classes[k].class_name for k in absent),
        islands={classes[k].class_name: int(pixels.sum()) for k, pixels in removed.items()},
    )


def _islands(query: Query, classes: Sequence[ClassQuery], winner: np.ndarray) -> dict[int, np.ndarray]:
    """Return the pixels (h, w) bool to take from each class that has one piece, by its row.

    winner: (h, w), 0 for the background and 1 + row for a class. Prompts may mark several pieces.
    """
    found = {}
    for row, one in enumerate(classes):
        if one.class_id in query.calibration.single and not one.prompts.assert_presence:
            pixels = islands(winner == row + 1)
            if pixels.any():
                found[row] = pixels
    return found


def _softmax(logits: Tensor) -> Tensor:
    """Return the probabilities (K + 1, h, w), background first, of the logits (K, h, w) of K classes."""
    return torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(0)
