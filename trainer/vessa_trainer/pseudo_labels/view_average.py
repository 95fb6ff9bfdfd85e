"""Average the annotator's label of an image over turned and scaled views of it.

The annotator's errors differ between views, and its own confidence does not show them. On acdc (validation)
foreground pixels on which all five views agree are right in 0.89 of the cases, those of one view in 0.18.
Mirrored views are left out: a mirrored heart is another organ.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vessa.datasets import Case, Dataset, Slice
from vessa_trainer.pseudo_labels.fetcher import FetchResult, LabelFetcher, LabelQuery
from vessa_trainer.pseudo_labels.types import PseudoLabel

VIEWS = ((10.0, 1.0), (-10.0, 1.0), (0.0, 0.85), (0.0, 1.2))  # angle in degrees, scale
# Fitted by likelihood on validation patients of acdc: the expected calibration error falls from 0.13 to 0.06.
_TEMPERATURE = 1.5


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


def back(label: PseudoLabel, angle: float, scale: float) -> PseudoLabel:
    """Return the label of a view on the image; confidence 0 where the view does not show it."""
    planes = torch.from_numpy(np.stack([label.labels, label.confidence])).float()[None]
    grid = _grid(label.labels.shape, -angle, 1 / scale)
    moved = F.grid_sample(planes, grid, mode="nearest", align_corners=False)[0].byte().numpy()
    return PseudoLabel(moved[0], moved[1])


def average(labels: Sequence[PseudoLabel], class_ids: Sequence[int]) -> PseudoLabel:
    """Return the label of the mean class probabilities, with calibrated confidence.

    labels: of one image, (H, W) each; a pixel of confidence 0 has no vote
    class_ids: of all classes, background among them
    """
    voters = np.stack([one.confidence > 0 for one in labels])
    votes = [voting * one.probabilities(class_ids) for voting, one in zip(voters, labels, strict=True)]
    mean = sum(votes[1:], votes[0]) / np.maximum(voters.sum(0), 1)
    flat = np.maximum(mean, 1e-3) ** (1 / _TEMPERATURE)
    confidence = np.rint(255 * flat.max(0) / flat.sum(0))
    ids, known = np.asarray(class_ids, np.uint8)[mean.argmax(0)], voters.any(0)
    return PseudoLabel(np.where(known, ids, 0), np.where(known, confidence, 0).astype(np.uint8))


def label_by_views(
    images: Sequence[np.ndarray],
    class_ids: Sequence[int],
    request: Callable[[Sequence[np.ndarray]], list[PseudoLabel]],
) -> list[PseudoLabel]:
    """Return the averaged labels of images, uint8 (H, W[, 3]) each. request: labels images as they are."""
    by_view = [request(images)]
    for view in VIEWS:
        shown = request([seen(image, *view) for image in images])
        by_view.append([back(label, *view) for label in shown])
    return [average(labels, class_ids) for labels in zip(*by_view, strict=True)]


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


class ViewAverage:
    """Fetches labels averaged over views. One thread uses it."""

    def __init__(self, dataset: Dataset, fetcher_of: Callable[[Dataset], LabelFetcher]) -> None:
        """Prepare one fetcher for the plain image and one for each view. fetcher_of: opens one."""
        self.plain = fetcher_of(dataset)
        self._views = [fetcher_of(ViewDataset(dataset, *view)) for view in VIEWS]

    def fetch(self, batch: Sequence[LabelQuery]) -> FetchResult:
        """Fetch a batch. Prompts go with the plain image alone: the other views vote without them.

        Labels whose views are late or are fetched elsewhere go back to the queue: `late` and `elsewhere`.
        Raises what `LabelFetcher.fetch` raises.
        """
        result = self.plain.fetch(batch)
        items = [wanted.item for wanted, _ in result.labels]
        if not items:
            return result
        by_view = [self._labels(fetcher, items, result) for fetcher in self._views]
        plain, result.labels = result.labels, []
        for wanted, label in plain:
            name = wanted.item.name
            if any(name not in found for found in by_view):
                (result.elsewhere if result.reason is None else result.late).append(wanted)
                continue
            turned = [back(found[name], *view) for found, view in zip(by_view, VIEWS, strict=True)]
            result.labels.append((wanted, average([label, *turned], [0, *self.plain.class_ids])))
        return result

    @staticmethod
    def _labels(fetcher: LabelFetcher, items: Sequence[Slice], result: FetchResult) -> dict[str, PseudoLabel]:
        found = fetcher.fetch([LabelQuery(item) for item in items])  # a query keeps the image of its view
        result.asked |= found.asked
        result.reason = result.reason or found.reason
        return {wanted.item.name: label for wanted, label in found.labels}

    @property
    def requests(self) -> int:
        """Requests of all views."""
        return self.plain.requests + sum(f.requests for f in self._views)

    @property
    def images(self) -> int:
        """Images sent or named in requests, of all views."""
        return self.plain.images + sum(f.images for f in self._views)

    @property
    def cache_hits(self) -> int:
        """Labels that came from the cache, of all views."""
        return self.plain.cache_hits + sum(f.cache_hits for f in self._views)

    @property
    def failed_items(self) -> int:
        """Items that the annotator failed on, of all views."""
        return self.plain.failed_items + sum(f.failed_items for f in self._views)
