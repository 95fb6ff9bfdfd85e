"""Take a refined label only where more views of the image agree with it than with the label before.

Feedback can echo: the annotator repeats the box that it was given, and the label gets no better. Views are
labels without prompts of the image turned and scaled; no box has reached them. Mirrored views are left out: a
mirrored heart is another organ.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vessa.datasets import Case, Dataset, Slice
from vessa_trainer.pseudo_labels.fetcher import Fetched, LabelFetcher, Wanted
from vessa_trainer.pseudo_labels.types import PseudoLabel

VIEWS = ((10.0, 1.0), (-10.0, 1.0), (0.0, 0.85), (0.0, 1.2))  # angle in degrees, scale
_UNSEEN = 255  # outside of a view: no vote


def _grid(shape: Sequence[int], angle: float, scale: float) -> Tensor:
    """Return sampling points of an image turned by `angle` and shown `scale` times as large."""
    height, width = shape[:2]
    cosine, sine = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    # The rows weigh height against width, so that a view of an oblong image turns without shearing it.
    theta = torch.tensor([[[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]])
    return F.affine_grid(theta, [1, 1, height, width], align_corners=False)


def seen(image: np.ndarray, angle: float, scale: float) -> np.ndarray:
    """Return a view of an image uint8 (H, W[, 3]), of the same size; outside is 0."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float()
    planes = pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]
    moved = F.grid_sample(planes, _grid(image.shape, angle, scale), align_corners=False)[0]
    moved = moved.round().clamp(0, 255).byte()
    return (moved[0] if pixels.ndim == 2 else moved.permute(1, 2, 0)).contiguous().numpy()


def back(labels: np.ndarray, angle: float, scale: float) -> np.ndarray:
    """Return the labels of a view, uint8 (H, W), on the image; 255 where the view does not show it."""
    planes = torch.from_numpy(np.stack([labels, np.ones_like(labels)])).float()[None]
    grid = _grid(labels.shape, -angle, 1 / scale)
    moved = F.grid_sample(planes, grid, mode="nearest", align_corners=False)[0]
    return torch.where(moved[1] > 0, moved[0], _UNSEEN).byte().numpy()


def accept(before: PseudoLabel, refined: PseudoLabel, views: Sequence[np.ndarray]) -> PseudoLabel:
    """Return the refined label where more views agree with it than with the label before, else the latter.

    views: class ids uint8 (H, W) each, 255 for no vote
    """

    def votes(label: PseudoLabel) -> np.ndarray:
        return np.asarray(sum((view == label.labels).astype(np.int16) for view in views))

    better = votes(refined) > votes(before)
    return PseudoLabel(
        np.where(better, refined.labels, before.labels),
        np.where(better, refined.confidence, before.confidence),
    )


class ViewDataset(Dataset):
    """A data set whose images are seen in one view; it has no masks."""

    def __init__(self, source: Dataset, angle: float, scale: float) -> None:
        """Wrap a data set."""
        super().__init__(source.root)
        self.classes, self._source, self._view = source.classes, source, (angle, scale)

    def cases(self) -> tuple[Case, ...]:
        """Return all cases."""
        return self._source.cases()

    def image(self, item: Slice) -> np.ndarray:
        """Return the pixels of the view, uint8 (H, W) or (H, W, 3)."""
        return seen(self._source.image(item), *self._view)

    def mask(self, item: Slice) -> None:
        """Return None: a view is not annotated."""


class ViewAgreement:
    """Judges refined labels by views. One thread uses it."""

    def __init__(self, dataset: Dataset, fetcher_of: Callable[[Dataset], LabelFetcher]) -> None:
        """Prepare one fetcher for the plain image and one for each view. fetcher_of: opens one."""
        self._plain = fetcher_of(dataset)
        self._views = [fetcher_of(ViewDataset(dataset, *view)) for view in VIEWS]
        self._changed = self._taken = 0  # pixels that refining changed, and those of them taken

    def judge(self, result: Fetched) -> None:
        """Replace the refined labels of a batch by what the views accept of them.

        Labels whose views are late or are fetched elsewhere go back to the queue: `late` and `elsewhere`.
        """
        refined = [(wanted, label) for wanted, label in result.labels if wanted.prompts is not None]
        if not refined:
            return
        items = [wanted.item for wanted, _ in refined]
        by_view = [self._labels(fetcher, items, result) for fetcher in (self._plain, *self._views)]
        complete = set.intersection(*(set(found) for found in by_view))
        kept = [pair for pair in result.labels if pair[0].prompts is None]
        for wanted, label in refined:
            name = wanted.item.name
            if name not in complete:
                (result.elsewhere if result.reason is None else result.late).append(wanted)
                continue
            before, views = by_view[0][name], [found[name].labels for found in by_view[1:]]
            turned = [back(one, *view) for one, view in zip(views, VIEWS, strict=True)]
            taken = accept(before, label, [before.labels, *turned])
            self._changed += int((label.labels != before.labels).sum())
            self._taken += int((taken.labels != before.labels).sum())
            kept.append((wanted, taken))
        result.labels = kept

    @staticmethod
    def _labels(fetcher: LabelFetcher, items: Sequence[Slice], result: Fetched) -> dict[str, PseudoLabel]:
        found = fetcher.fetch([Wanted(item) for item in items])  # each holds the image of its own view
        result.asked |= found.asked
        result.reason = result.reason or found.reason
        return {wanted.item.name: label for wanted, label in found.labels}

    def taken_share(self) -> float | None:
        """Return the share of the pixels changed by refining that the views accepted."""
        return self._taken / self._changed if self._changed else None
