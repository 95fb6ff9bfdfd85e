"""Pools of slices, and the episodes drawn from them: templates, a target and the classes to follow.

A pool holds one data set's or study's slices as squares. Templates come from a bank of 5 % of its
groups (paper section 3.1), redrawn now and then. Targets come from the other groups, so that a template
and its target are never of the same patient. Half of the templates are the most similar ones by the
retriever's own features (Eq. 1), the others are random, because a lab's bank of one patient holds bad
matches too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vessa.datasets import Dataset
from vessa.datasets.base import IGNORE
from vessa_server.model.geometry import Square, to_tensor
from vessa_server.pretraining.data.synthetic import Study

MIN_AREA = 0.0005  # of the square; a smaller structure has too few pixels even in a second look
BANK_SHARE = 0.05
POOL_SCALE = 1.5  # pools are finer than what the network sees, so that a second look finds more
POOL_LIMIT = 512  # px; few medical slices are finer, and all of them are held in memory
CLASSES_AN_EPISODE = 3  # the image encoder costs most: several classes share its features
SIMILAR = 3  # most similar templates among which Eq. 1 draws; the service keeps as many in memory
ABSENT_SHARE, RANDOM_TEMPLATES_SHARE = 0.12, 0.5
TAU = 0.1


@dataclass(frozen=True)
class Episode:
    """One task: draw each of `classes` in the target as the templates show it.

    templates: T images, uint8 (S, S), the most similar one first; template_masks: their T masks, uint8
    (S, S) class ids, each showing all of `classes`; target, target_mask: (S, S) uint8; classes: id to name
    """

    templates: tuple[np.ndarray, ...]
    template_masks: tuple[np.ndarray, ...]
    target: np.ndarray
    target_mask: np.ndarray
    classes: dict[int, str]


class Pool:
    """Slices of one data set or study.

    images, masks: (N, S, S) uint8; groups: N names; classes: id to name
    vectors: (N, D) unit vectors of the retriever, for Eq. 1; None until they are computed
    """

    def __init__(
        self, name: str, images: np.ndarray, masks: np.ndarray, groups: Sequence[str], classes: dict[int, str]
    ) -> None:
        self.name = name
        self.images, self.masks = images, masks
        names, self.group_of = np.unique(np.asarray(groups), return_inverse=True)
        self.group_names = [str(n) for n in names]
        area = {c: (masks == c).mean((1, 2)) for c in classes}
        self.showing = {c: np.flatnonzero((a > MIN_AREA) & (a < 0.4)) for c, a in area.items()}
        self.classes = {
            c: n for c, n in classes.items() if len(np.unique(self.group_of[self.showing[c]])) >= 2
        }
        self.vectors: np.ndarray | None = None
        self.bank: np.ndarray = np.array([], dtype=int)

    def redraw_bank(self, rng: np.random.Generator) -> None:
        """Draw the groups whose slices serve as templates until the next call."""
        count = max(1, round(BANK_SHARE * len(self.group_names)))
        self.bank = rng.choice(len(self.group_names), count, replace=False)

    def draw(self, rng: np.random.Generator, templates: int = 1) -> Episode | None:
        """Draw an episode of at most `CLASSES_AN_EPISODE` classes.

        Returns None when the bank shows no class that other groups show.
        """
        class_id = int(rng.choice(list(self.classes)))
        showing = self.showing[class_id]
        in_bank = np.isin(self.group_of[showing], self.bank)
        candidates, others = showing[in_bank], showing[~in_bank]
        if not len(candidates) or not len(others):
            return None
        target = int(rng.choice(others))
        if rng.random() < ABSENT_SHARE:  # the network must be able to say that a structure is absent
            target = int(rng.choice(np.flatnonzero(~np.isin(self.group_of, self.bank))))
        rows = self._templates(rng, candidates, target, templates)
        shown = [c for c in self.classes if c != class_id and np.isin(rows, self.showing[c]).all()]
        further = rng.permutation(shown)[: CLASSES_AN_EPISODE - 1].tolist()
        return Episode(
            tuple(self.images[row] for row in rows),
            tuple(self.masks[row] for row in rows),
            self.images[target],
            self.masks[target],
            {c: self.classes[c] for c in (class_id, *further)},
        )

    def _templates(
        self, rng: np.random.Generator, candidates: np.ndarray, target: int, count: int
    ) -> np.ndarray:
        """Choose `count` rows: by Eq. 1 among the most similar candidates, or at random."""
        if self.vectors is None or rng.random() < RANDOM_TEMPLATES_SHARE:
            return rng.choice(candidates, count, replace=len(candidates) < count)
        similarity = self.vectors[candidates] @ self.vectors[target]
        best = np.argsort(similarity)[::-1][:SIMILAR]
        weights = np.exp((similarity[best] - similarity[best[0]]) / TAU)
        chosen = rng.choice(best, count, replace=len(best) < count, p=weights / weights.sum())
        return candidates[chosen[np.argsort(-similarity[chosen], kind="stable")]]

    def draw_layouts(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw slices that show a class: images (count, S, S) uint8 and masks of the pool's classes."""
        showing = np.unique(np.concatenate([self.showing[c] for c in self.classes]))
        rows = rng.choice(showing, count, replace=len(showing) < count)
        masks = self.masks[rows]
        return self.images[rows], np.where(np.isin(masks, list(self.classes)), masks, 0)


def pool_of_study(study: Study, name: str) -> Pool:
    """Make a pool of a synthetic study."""
    return Pool(name, np.stack(study.images), np.stack(study.masks), study.groups, study.classes)


def pool_size(image_size: int) -> int:
    """Side of a pool's squares in px, for a network that sees `image_size` px."""
    return min(POOL_LIMIT, int(POOL_SCALE * image_size))


def squares_of(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Make an image, uint8 (H, W[, 3]), gray, and it and its mask, uint8 (H, W), squares of `size` px."""
    square = Square(*mask.shape)
    gray = (square.enter(to_tensor(image), size).mean(1)[0] * 255).round()
    label: Tensor = torch.from_numpy(mask.astype(np.float32))[None, None]
    label = square.enter(label, size, "nearest-exact")[0, 0]
    return gray.byte().numpy(), label.byte().numpy()


def pool_of_dataset(dataset: Dataset, groups: Sequence[str], size: int) -> Pool:
    """Make a pool of some groups of a data set; color becomes gray, images become squares of `size` px."""
    wanted = set(groups)
    images, masks, names = [], [], []
    for item in dataset.slices():
        if item.group not in wanted:
            continue
        mask = dataset.mask(item)
        if mask is None:
            continue
        known = np.where(mask == IGNORE, 0, mask).astype(np.uint8)
        image, label = squares_of(dataset.image(item), known, size)
        images.append(image)
        masks.append(label)
        names.append(item.group)
    return Pool(dataset.name, np.stack(images), np.stack(masks), names, dict(dataset.classes))
