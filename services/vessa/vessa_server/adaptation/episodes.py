"""Episodes to adapt a bank with: its templates from one another, and regions of unlabeled images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidRequest
from vessa_server.pretraining.data.pools import Episode, Pool, squares_of
from vessa_server.pretraining.data.regions import region_episode
from vessa_server.template_bank.retrieval import Bank

LEAST_TEMPLATES = 6
LEAST_PATIENTS = 3  # with fewer, slices are held out and not patients
REGION_SHARE = 0.5  # of the episodes
SELF_SHARE = 0.3  # of the template episodes show the template itself in two augmented views
CLASSES = 3  # of an episode: the image encoder costs most
LAYOUT_WIDTH = 0.05  # templates of a similar layout are likelier, as retrieval would find them
LEAST_PIXELS = 30  # of a class in a template's square
ATTEMPTS = 20


@dataclass(frozen=True)
class Episodes:
    """Draws episodes.

    images, masks: (N, S, S) uint8 of the templates to learn from; unlabeled: (M, S, S) uint8
    classes: id to name
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    unlabeled: NDArray[np.uint8]
    classes: dict[int, str]

    def draw(self, rng: np.random.Generator) -> Episode:
        """Draw a region task or a template episode."""
        for _ in range(ATTEMPTS):
            if rng.random() < REGION_SHARE:
                image = self.unlabeled[int(rng.integers(len(self.unlabeled)))]
                found = region_episode(image, rng)
            else:
                found = self._template_episode(rng)
            if found is not None:
                return found
        raise InvalidRequest(
            "no episode could be drawn: the templates show no class of useful size and the images no region. "
            "Add templates, or images with more contrast"
        )

    def _template_episode(self, rng: np.random.Generator) -> Episode | None:
        target = int(rng.integers(len(self.images)))
        areas = {c: (self.masks == c).sum((1, 2)) for c in self.classes}
        shown = [c for c, area in areas.items() if area[target] >= LEAST_PIXELS]
        if not shown:
            return None
        chosen = [int(c) for c in rng.permutation(shown)[:CLASSES]]
        template = target
        if rng.random() >= SELF_SHARE and len(self.images) > 1:
            roots = np.sqrt(np.stack([areas[c] for c in chosen], 1) / self.masks[0].size)
            weights = np.exp(-np.abs(roots - roots[target]).sum(1) / LAYOUT_WIDTH)
            weights *= np.all(roots > 0, axis=1)
            weights[target] = 0
            if weights.sum() > 0:
                template = int(rng.choice(len(weights), p=weights / weights.sum()))
        return Episode(
            (self.images[template],),
            (self.masks[template],),
            self.images[target],
            self.masks[target],
            {c: self.classes[c] for c in chosen},
        )


def episodes_of(
    bank: Bank, unlabeled: NDArray[np.uint8], size: int, rng: np.random.Generator
) -> tuple[Episodes, Pool]:
    """Return the episodes to learn from, and the pool of the whole bank with held-out slices as targets.

    A third of the patients is held out, or of the slices when there are fewer than three patients.
    unlabeled: (M, size, size) uint8; size: side of the squares, px. Raises InvalidRequest when the bank holds
    too few templates.
    """
    templates = bank.templates
    if len(templates) < LEAST_TEMPLATES:
        raise InvalidRequest(
            f"bank '{bank.name}' holds {len(templates)} templates; "
            f"adaptation needs at least {LEAST_TEMPLATES}: add more annotated slices"
        )
    images, masks = (
        np.stack(a) for a in zip(*(squares_of(t.image, t.mask, size) for t in templates), strict=True)
    )
    patients = len({t.group for t in templates})
    keys = [t.group if patients >= LEAST_PATIENTS else f"{i:05d}" for i, t in enumerate(templates)]
    names = rng.permutation(sorted(set(keys))).tolist()
    held = set(names[: max(1, len(names) // 3)])
    rows = [i for i, key in enumerate(keys) if key not in held]
    whole = Pool(bank.name, images, masks, keys, bank.classes)
    whole.bank = np.flatnonzero([name not in held for name in whole.group_names])
    if not whole.classes:
        raise InvalidRequest(
            f"no class of bank '{bank.name}' is shown, and not too small, by enough of its templates "
            "to learn from some and be tested on others"
        )
    known = images[rows]
    return Episodes(known, masks[rows], np.concatenate([known, unlabeled]), bank.classes), whole


def held_out_pairs(pool: Pool, count: int, rng: np.random.Generator) -> list[Episode]:
    """Draw at most `count` episodes whose targets are held out and show the classes that are asked for."""
    drawn = (pool.draw(rng) for _ in range(ATTEMPTS * count))
    pairs = [p for p in drawn if p is not None and all((p.target_mask == c).any() for c in p.classes)]
    if not pairs:
        raise InvalidRequest(
            f"the held-out templates of bank '{pool.name}' show no class that the others show"
        )
    return pairs[:count]
