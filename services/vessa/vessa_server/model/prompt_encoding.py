"""Encode prompts in native px as SAM 2's prompt encoder expects them in the network's square."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vessa_server.model.geometry import Square, resize
from vessa_server.model.segmenter import PromptBatch

_OUTSIDE = -6.0  # mask logit outside of the image
BOX_MARGIN = 0.1  # of a box's longer side: a student's boxes are rough


@dataclass(frozen=True)
class MaskPrompts:
    """Prompts of one mask in px of its image; None for a kind of prompt that it lacks.

    box: (4,) XYXY; points: (P, 2) (x, y) with point_labels (P,) 1 inside, 0 outside, -1 padding;
    mask_logits: (h, w) over the whole image
    """

    box: np.ndarray | None = None
    points: np.ndarray | None = None
    point_labels: np.ndarray | None = None
    mask_logits: np.ndarray | None = None

    @property
    def assert_presence(self) -> bool:
        """Whether a prompt asserts that the structure is in the image."""
        inside = self.point_labels is not None and bool((self.point_labels == 1).any())
        drawn = self.mask_logits is not None and bool((self.mask_logits > 0).any())
        return self.box is not None or inside or drawn


def prompt_batch(
    prompts: Sequence[MaskPrompts], squares: Sequence[Square], size: int, side: int, device: torch.device
) -> PromptBatch:
    """Move the prompts of N masks into squares of `size` px; mask logits onto `side` x `side`."""
    sparse = [_sparse(p, s, size) for p, s in zip(prompts, squares, strict=True)]
    longest = max(len(kinds) for _, kinds in sparse)
    points = torch.zeros(len(prompts), longest, 2)
    labels = torch.full((len(prompts), longest), -1)
    for row, (xy, kinds) in enumerate(sparse):
        points[row, : len(kinds)], labels[row, : len(kinds)] = xy, kinds
    present = torch.tensor([p.mask_logits is not None for p in prompts])
    logits = None
    if present.any():
        dense = [_dense(p, s, side) for p, s in zip(prompts, squares, strict=True)]
        logits = torch.stack(dense).to(device)
    if not longest:
        return PromptBatch(mask_logits=logits, mask_present=present.to(device))
    return PromptBatch(points.to(device), labels.to(device), logits, present.to(device))


def _sparse(prompts: MaskPrompts, square: Square, size: int) -> tuple[Tensor, Tensor]:
    """Return points (P, 2) on the square and SAM's labels. The corners of a box have labels 2 and 3."""
    xy, kinds = [], []
    if prompts.box is not None:
        xy += prompts.box.reshape(2, 2).tolist()
        kinds += [2, 3]
    if prompts.points is not None and prompts.point_labels is not None:
        for point, kind in zip(prompts.points, prompts.point_labels, strict=True):
            if kind >= 0:
                xy.append(point.tolist())
                kinds.append(int(kind))
    native = torch.tensor(xy, dtype=torch.float32).view(-1, 2)
    return square.points(native, size), torch.tensor(kinds, dtype=torch.long)


def _dense(prompts: MaskPrompts, square: Square, side: int) -> Tensor:
    """Return mask logits on the square, (1, side, side); zeros for a mask without logits."""
    if prompts.mask_logits is None:
        return torch.zeros(1, side, side)
    logits = torch.from_numpy(prompts.mask_logits.astype(np.float32))[None, None]
    native = resize(logits, (square.height, square.width)) - _OUTSIDE
    return square.enter(native, side)[0] + _OUTSIDE


def hold_to_box(logits: Tensor, box: np.ndarray, square: Square, outside: float) -> Tensor:
    """Exclude pixels outside of a box prompt: a box asserts that the structure lies inside it.

    logits: (1, 1, s, s) on the square; box: (4,) XYXY in native px; outside: logit of excluded pixels
    """
    size = logits.shape[-1]
    corners = square.points(torch.from_numpy(box.astype(np.float32)).view(2, 2), size)
    margin = BOX_MARGIN * (corners[1] - corners[0]).max() + 0.5
    (left, top), (right, bottom) = (corners[0] - margin).tolist(), (corners[1] + margin).tolist()
    middle = torch.arange(size, device=logits.device) + 0.5
    inside = ((middle > top) & (middle < bottom))[:, None] & ((middle > left) & (middle < right))
    return torch.where(inside, logits, outside)
